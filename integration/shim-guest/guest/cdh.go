/*
   Copyright The guest-pull Authors.

   Licensed under the Apache License, Version 2.0 (the "License");
   you may not use this file except in compliance with the License.
   You may obtain a copy of the License at

       http://www.apache.org/licenses/LICENSE-2.0

   Unless required by applicable law or agreed to in writing, software
   distributed under the License is distributed on an "AS IS" BASIS,
   WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
   See the License for the specific language governing permissions and
   limitations under the License.
*/

package guest

import (
	"bytes"
	"compress/gzip"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/pelletier/go-toml/v2"
	"golang.org/x/net/http/httpproxy"
)

// AnnotationInitData is the annotation in which a pod carries init data.
const AnnotationInitData = "io.katacontainers.config.hypervisor.cc_init_data"

// cdh is what the Confidential Data Hub of a guest is configured with, as far as
// pulling is concerned. Sources, in confidential-containers/guest-components:
// confidential-data-hub/hub/src/config/mod.rs (CdhConfig), image-rs/src/config.rs
// (ImageConfig, ProxyConfig) and image-rs/src/registry/mod.rs (Config, Registry,
// Mirror). It is the guest's own reader; it shares nothing with what writes such a
// file.
type cdh struct {
	image struct {
		registries registries
		proxy      *httpproxy.Config
		roots      *x509.CertPool
	}
}

type registries struct {
	Unqualified []string       `toml:"unqualified-search-registries"`
	Registry    []registryRule `toml:"registry"`
}

type registryRule struct {
	Prefix   string           `toml:"prefix"`
	Insecure bool             `toml:"insecure"`
	Blocked  bool             `toml:"blocked"`
	Location string           `toml:"location"`
	Mirror   []registryMirror `toml:"mirror"`
}

type registryMirror struct {
	Location string `toml:"location"`
	Insecure bool   `toml:"insecure"`
}

// loadCDH reads the file of Config.CDHConfig.
func loadCDH(path string) (*cdh, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read cdh.toml: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	c, err := parseCDH(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// parseInitData reads the value of AnnotationInitData (kata-containers,
// src/libs/kata-types/src/initdata.rs and src/agent/src/initdata.rs). CDH refuses a
// file without [kbc], which there is none without.
func parseInitData(value string) (*cdh, error) {
	fail := func(format string, args ...any) (*cdh, error) {
		return nil, fmt.Errorf("init data: %w: %w", errdefs.ErrInvalidArgument, fmt.Errorf(format, args...))
	}
	packed, err := base64.StdEncoding.DecodeString(value)
	if err != nil {
		return fail("%w", err)
	}
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return fail("%w", err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		return fail("%w", err)
	}
	var d struct {
		Version   string            `toml:"version"`
		Algorithm string            `toml:"algorithm"`
		Data      map[string]string `toml:"data"`
	}
	if err := toml.Unmarshal(text, &d); err != nil {
		return fail("%w", err)
	}
	if d.Version != "0.1.0" {
		return fail("version is %q, want 0.1.0", d.Version)
	}
	switch d.Algorithm {
	case "sha256", "sha384", "sha512":
	default:
		return fail("algorithm is %q", d.Algorithm)
	}
	conf, ok := d.Data["cdh.toml"]
	if !ok {
		return nil, nil
	}
	var c struct {
		KBC *struct {
			Name string `toml:"name"`
		} `toml:"kbc"`
	}
	if err := toml.Unmarshal([]byte(conf), &c); err != nil {
		return fail("cdh.toml: %w", err)
	}
	if c.KBC == nil || c.KBC.Name == "" {
		return fail("cdh.toml: missing field `kbc`")
	}
	return parseCDH([]byte(conf))
}

func parseCDH(text []byte) (*cdh, error) {
	var t struct {
		Image struct {
			RegistryConfig registries `toml:"registry_config"`
			Certificates   []string   `toml:"extra_root_certificates"`
			Proxy          *struct {
				HTTPS string `toml:"https_proxy"`
				HTTP  string `toml:"http_proxy"`
				No    string `toml:"no_proxy"`
			} `toml:"image_pull_proxy"`
			Credentials string `toml:"authenticated_registry_credentials_uri"`
		} `toml:"image"`
	}
	fail := func(format string, args ...any) (*cdh, error) {
		return nil, fmt.Errorf("cdh.toml: %w: %w", errdefs.ErrInvalidArgument, fmt.Errorf(format, args...))
	}
	if err := toml.Unmarshal(text, &t); err != nil {
		return fail("%w", err)
	}
	if t.Image.Credentials != "" {
		return fail("the stand-in guest has no key broker to get %s from", t.Image.Credentials)
	}
	c := &cdh{}
	c.image.registries = t.Image.RegistryConfig
	if len(c.image.registries.Unqualified) == 0 {
		c.image.registries.Unqualified = []string{"docker.io"}
	}
	// Config::validate_and_tidy.
	for i := range c.image.registries.Registry {
		r := &c.image.registries.Registry[i]
		if r.Prefix == "" {
			r.Prefix = r.Location
		}
		if r.Prefix == "" {
			return fail("both location and prefix are empty")
		}
		if strings.HasPrefix(r.Prefix, "*.") && r.Location == "" {
			return fail("location is unset and prefix is with wildcard")
		}
		for _, m := range r.Mirror {
			if m.Location == "" {
				return fail("mirror location is empty")
			}
		}
	}
	var err error
	if c.image.roots, err = x509.SystemCertPool(); err != nil {
		return nil, fmt.Errorf("read the system's certificates: %w", err)
	}
	// reqwest::Certificate::from_pem: one of each.
	for i, text := range t.Image.Certificates {
		block, rest := pem.Decode([]byte(text))
		if block == nil || block.Type != "CERTIFICATE" || len(bytes.TrimSpace(rest)) > 0 {
			return fail("extra_root_certificates: entry %d is not one certificate in PEM", i+1)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return fail("extra_root_certificates: entry %d: %w", i+1, err)
		}
		c.image.roots.AddCert(cert)
	}
	if p := t.Image.Proxy; p != nil {
		c.image.proxy = &httpproxy.Config{HTTPProxy: p.HTTP, HTTPSProxy: p.HTTPS, NoProxy: p.No}
	}
	return c, nil
}

// pullTask is one place to pull an image from.
type pullTask struct {
	reference string
	http      bool
}

// tasks are the places that are tried for an image, in that order
// (RegistryHandler::process).
func (c *cdh) tasks(image string) ([]pullTask, error) {
	ref, err := name.ParseReference(image)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	host := ref.Context().RegistryStr()
	rest := strings.TrimPrefix(ref.Name(), host)
	hosts := []string{host}
	if host == name.DefaultRegistry {
		hosts = c.image.registries.Unqualified
	}
	var tasks []pullTask
	for _, host := range hosts {
		if host != "docker.io" && len(hosts) > 1 {
			rest = strings.TrimPrefix(rest, "/library")
		}
		tasks = append(tasks, c.image.registries.expand(host+rest)...)
	}
	if len(tasks) == 0 {
		return nil, fmt.Errorf("image %s is blocked by registry rule: %w", image, errdefs.ErrPermissionDenied)
	}
	return tasks, nil
}

// expand is RegistryHandler::handle_registry_tasks for one name.
func (r registries) expand(image string) (tasks []pullTask) {
	var (
		rule  *registryRule
		after = -1
	)
	for i := range r.Registry {
		// max_by_key returns the last of several.
		if n := matchPrefix(image, r.Registry[i].Prefix); n >= 0 && n >= after {
			rule, after = &r.Registry[i], n
		}
	}
	switch {
	case rule == nil:
		return []pullTask{{reference: image}}
	case rule.Blocked:
		return nil
	}
	for _, m := range rule.Mirror {
		tasks = append(tasks, pullTask{reference: m.Location + image[after:], http: m.Insecure})
	}
	if rule.Location == "" {
		return append(tasks, pullTask{reference: image})
	}
	return append(tasks, pullTask{reference: rule.Location + image[after:], http: rule.Insecure})
}

// matchPrefix is RegistryHandler::match_reference_prefix, which looks for the prefix
// anywhere: where it ends, or -1.
func matchPrefix(image, prefix string) int {
	rest, wildcard := strings.CutPrefix(prefix, "*")
	at := strings.Index(image, rest)
	if at < 0 || (wildcard && strings.Contains(image[:at], "/")) {
		return -1
	}
	at += len(rest)
	if at < len(image) && !strings.ContainsRune(":/@", rune(image[at])) {
		return -1
	}
	return at
}

// transport reaches registries as the guest is configured to: through its proxy,
// and over plain HTTP only where it is told so.
func (c *cdh) transport(task pullTask, base *http.Transport) http.RoundTripper {
	base.Proxy = nil
	if c.image.proxy != nil {
		proxy := c.image.proxy.ProxyFunc()
		base.Proxy = func(r *http.Request) (*url.URL, error) { return proxy(r.URL) }
	}
	base.TLSClientConfig.RootCAs = c.image.roots
	scheme := "https"
	if task.http {
		scheme = "http"
	}
	return fixedScheme{base, scheme}
}

// fixedScheme keeps the client from choosing the scheme by the name of the host.
type fixedScheme struct {
	*http.Transport
	scheme string
}

func (t fixedScheme) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme = t.scheme
	return t.Transport.RoundTrip(r)
}

// tryAll tries the places one after the other (ImageClient::pull_image in
// image-rs/src/image.rs).
func tryAll[T any](tasks []pullTask, image string, try func(pullTask) (T, error)) (T, error) {
	var errs []error
	for _, t := range tasks {
		got, err := try(t)
		if err == nil {
			return got, nil
		}
		errs = append(errs, fmt.Errorf("image: %s, error: %w", t.reference, err))
	}
	var none T
	return none, fmt.Errorf("failed to pull image %s from all mirror/mapping locations or original location: %w", image, errors.Join(errs...))
}
