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

// Package guestconfig says to a confidential guest what a node knows of registries,
// in the guest's own words: mirrors, registries over plain HTTP, private authorities
// and proxies, out of containerd's effective configuration.
//
// A guest of Confidential Containers is told by the configuration of its
// Confidential Data Hub, cdh.toml, section [image]. The contract is that of
// confidential-containers/guest-components: image-rs/src/config.rs (ImageConfig,
// ProxyConfig), image-rs/src/registry/mod.rs (Config, Registry, Mirror; process says
// in which order they are tried) and confidential-data-hub/hub/src/config/mod.rs
// (CdhConfig). The file reaches the guest in its init data, a TOML of version 0.1.0,
// which a pod carries, gzip-compressed and in base64, in the annotation
// [Annotation] (kata-containers/kata-containers, src/libs/kata-types/src/initdata.rs).
//
// No credential is ever in what this package returns: not one from a URL, a header,
// a client certificate, a proxy or the CRI configuration. [Result.Notes] says where
// the node has one.
package guestconfig

import (
	"cmp"
	"context"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/core/remotes/docker/config"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/guest-pull/guest-pull-snapshotter/builder/check"
)

// Image is the section [image] of cdh.toml, as far as a node has to do with it.
type Image struct {
	// CredentialsURI is where the guest gets its credentials for registries.
	CredentialsURI string `toml:"authenticated_registry_credentials_uri,omitempty"`
	// Certificates are authorities that are trusted for all registries and
	// proxies, one PEM block each.
	Certificates   []string        `toml:"extra_root_certificates,omitempty"`
	RegistryConfig *RegistryConfig `toml:"registry_config,omitempty"`
	Proxy          *Proxy          `toml:"image_pull_proxy,omitempty"`

	// ConfigurationURI is only read: of a configuration that is compared.
	ConfigurationURI string `toml:"registry_configuration_uri,omitempty"`
}

// RegistryConfig is what image-rs knows of registries.
type RegistryConfig struct {
	// Unqualified are the registries of names without one; none is docker.io.
	Unqualified []string   `toml:"unqualified-search-registries,omitempty"`
	Registries  []Registry `toml:"registry,omitempty"`
}

// Registry is where the images are whose name begins with Prefix: the mirrors in
// their order, then Location, or the registry of the name itself, by HTTPS, when
// there is no Location.
type Registry struct {
	Prefix   string   `toml:"prefix,omitempty"`
	Location string   `toml:"location,omitempty"`
	Insecure bool     `toml:"insecure,omitempty"` // plain HTTP, and only that
	Blocked  bool     `toml:"blocked,omitempty"`
	Mirrors  []Mirror `toml:"mirror,omitempty"`
}

// Mirror is another place of a registry's images.
type Mirror struct {
	Location string `toml:"location"`
	Insecure bool   `toml:"insecure,omitempty"`
}

// Proxy is how a guest reaches registries.
type Proxy struct {
	HTTPS string `toml:"https_proxy,omitempty"`
	HTTP  string `toml:"http_proxy,omitempty"`
	No    string `toml:"no_proxy,omitempty"`
}

// Node is what a node knows.
type Node struct {
	// Registry is CRI's part of containerd's effective configuration.
	Registry check.RegistryConfig
	// Env is the environment of the running containerd.
	Env map[string]string
}

// Result is what a guest has to be told.
type Result struct {
	Image Image
	// Notes are what has no counterpart in the guest, and what has to be known
	// of the rest: a sentence each, about the subject that it begins with.
	Notes []string
	// Credentials says that the node has credentials, which are not here.
	Credentials bool
}

// maker makes a Result.
type maker struct {
	Node
	Result
	// usedBy are the registries that have a mirror, by the mirror's location.
	usedBy map[string][]string
	// ordinary are the registries that are where their name says.
	ordinary []string
	// authorities are the certificates that Image has already.
	authorities map[string]bool
}

// Make returns what a guest has to be told. A registry limits it to that host, with
// its port if it has one: then settings for all registries count for it as well.
//
// The error is errdefs.ErrInvalidArgument for a registry that is no host, or for a
// hosts.toml whose files cannot be used, with which containerd would fail as well.
func Make(ctx context.Context, n Node, registry string) (Result, error) {
	if registry != "" {
		if u, err := url.Parse("//" + registry); err != nil || u.Host != registry || u.Hostname() == "" {
			return Result{}, fmt.Errorf("%q is not the host of a registry, such as registry.example:5000: %w", registry, errdefs.ErrInvalidArgument)
		}
	}
	m := &maker{Node: n, usedBy: map[string][]string{}, authorities: map[string]bool{}}
	var err error
	if paths := n.Registry.Paths(); len(paths) > 0 {
		err = m.fromDirectories(ctx, paths, registry)
	} else {
		err = m.fromMirrors(registry)
	}
	if err != nil {
		return Result{}, err
	}
	m.exceptions()
	for _, location := range slices.Sorted(maps.Keys(m.usedBy)) {
		if names := m.usedBy[location]; len(names) > 1 {
			m.note("%s: it is the mirror of %s; containerd tells it which registry it is asked for (?ns=), a guest does not", location, strings.Join(names, " and "))
		}
	}
	m.credentials(registry)
	m.proxies()
	return m.Result, nil
}

func (m *maker) note(format string, args ...any) {
	if s := fmt.Sprintf(format, args...); !slices.Contains(m.Notes, s) {
		m.Notes = append(m.Notes, s)
	}
}

// defaultDir is the directory for registries that have none of their own.
const defaultDir = "_default"

// fromDirectories reads the directories of config_path.
func (m *maker) fromDirectories(ctx context.Context, roots []string, only string) error {
	// As hostDirFromRoots of CRI (internal/cri/server/images/image_pull.go) does.
	hostDir := func(host string) (string, error) {
		for _, root := range roots {
			if dir, err := config.HostDirFromRoot(root)(host); !errdefs.IsNotFound(err) {
				return dir, err
			}
		}
		return "", errdefs.ErrNotFound
	}
	names := map[string]bool{only: true}
	if only == "" {
		names = map[string]bool{}
		for _, root := range roots {
			entries, err := os.ReadDir(root)
			if err != nil && !os.IsNotExist(err) {
				return err
			}
			for _, e := range entries {
				name := hostOfDir(e.Name())
				if name == defaultDir {
					m.note("all registries: what %s says has no counterpart in a guest; ask for each registry that pods use (--registry HOST)", filepath.Join(root, name))
				} else if info, err := os.Stat(filepath.Join(root, e.Name())); err == nil && info.IsDir() {
					names[name] = true
				}
			}
		}
	}
	hosts := config.ConfigureHosts(ctx, config.HostOptions{HostDir: hostDir})
	for _, name := range sortedHosts(names) {
		dir, err := hostDir(name)
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		found, err := hosts(name)
		if err != nil {
			return fmt.Errorf("registry %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		m.registry(name, found)
		if err := m.directory(name, dir, len(found)); err != nil {
			return err
		}
	}
	return nil
}

// fromMirrors reads the mirrors of the older kind, as registryEndpoints of CRI
// (internal/cri/server/images/image_pull.go) does.
func (m *maker) fromMirrors(only string) error {
	names := map[string]bool{only: true}
	if only == "" {
		names = map[string]bool{}
		for name := range m.Node.Registry.Mirrors {
			if name == "*" {
				m.note("all registries: the mirrors of \"*\" have no counterpart in a guest; ask for each registry that pods use (--registry HOST)")
				continue
			}
			names[name] = true
		}
	}
	for _, name := range sortedHosts(names) {
		mirrors, ok := m.Node.Registry.Mirrors[name]
		if !ok {
			mirrors = m.Node.Registry.Mirrors["*"]
		}
		origin, err := docker.DefaultHost(name)
		if err != nil {
			return fmt.Errorf("registry %s: %w: %w", name, err, errdefs.ErrInvalidArgument)
		}
		var found []docker.RegistryHost
		add := func(endpoint string) (host string, err error) {
			if !strings.Contains(endpoint, "://") {
				endpoint = schemeOf(endpoint) + "://" + endpoint
			}
			u, err := url.Parse(endpoint)
			if err != nil {
				return "", fmt.Errorf("registry %s: a mirror is no URL: %w", name, errdefs.ErrInvalidArgument)
			}
			if u.Path == "" {
				u.Path = "/v2"
			}
			found = append(found, docker.RegistryHost{Scheme: u.Scheme, Host: u.Host, Path: u.Path, Capabilities: docker.HostCapabilityPull | docker.HostCapabilityResolve})
			return u.Host, nil
		}
		own := false
		for _, e := range mirrors.Endpoints {
			host, err := add(e)
			if err != nil {
				return err
			}
			own = own || host == name
		}
		if !own {
			if _, err := add(origin); err != nil {
				return err
			}
		}
		m.registry(name, found)
	}
	return nil
}

// schemeOf is that of an endpoint without one (defaultScheme of CRI).
func schemeOf(host string) string {
	if docker.IsLocalhost(host) {
		return "http"
	}
	return "https"
}

// registry turns the hosts that containerd asks for a registry's images, in that
// order, into an entry.
func (m *maker) registry(name string, hosts []docker.RegistryHost) {
	const pulls = docker.HostCapabilityPull | docker.HostCapabilityResolve
	var places []Mirror
	for _, h := range hosts {
		if !h.Capabilities.Has(docker.HostCapabilityPull) && !h.Capabilities.Has(docker.HostCapabilityResolve) {
			continue // for pushes
		}
		if !h.Capabilities.Has(pulls) {
			m.note("%s: its host %s does not both resolve names and serve content; a guest cannot be told so, and is not told of that host", name, h.Host)
			continue
		}
		place := Mirror{Location: h.Host, Insecure: h.Scheme == "http"}
		if h.Client != nil {
			// What is neither is a RoundTripper that falls back to HTTP.
			if _, ok := h.Client.Transport.(*http.Transport); !ok {
				place.Insecure = true
			}
		}
		if isDockerHub(name, h.Host) {
			place.Location = name
		}
		// The path of a request is cleaned (dockerBase.request in core/remotes/docker).
		api := path.Join("/", h.Path)
		rest, ok := strings.CutPrefix(api+"/", "/v2/")
		if !ok {
			m.note("%s: its host %s has its API at %s; a guest asks at /v2, and is not told of that host", name, h.Host, api)
			continue
		}
		if rest = strings.TrimSuffix(rest, "/"); rest != "" {
			place.Location += "/" + rest
		}
		if !slices.Contains(places, place) {
			places = append(places, place)
		}
	}
	own := Mirror{Location: name}
	if len(places) == 1 && places[0] == own {
		m.ordinary = append(m.ordinary, name)
		return
	}
	entry := Registry{Prefix: name}
	if len(places) == 0 {
		entry.Blocked = true
		m.note("%s: containerd has no host that it could pull from, so that a guest is told not to either", name)
	} else {
		last := places[len(places)-1]
		entry.Mirrors = append(entry.Mirrors, places[:len(places)-1]...)
		if last != own {
			entry.Location, entry.Insecure = last.Location, last.Insecure
		}
	}
	for _, p := range places {
		if p.Location != name {
			m.usedBy[p.Location] = append(m.usedBy[p.Location], name)
		}
	}
	if m.Image.RegistryConfig == nil {
		m.Image.RegistryConfig = &RegistryConfig{}
	}
	m.Image.RegistryConfig.Registries = append(m.Image.RegistryConfig.Registries, entry)
}

// exceptions adds an entry for each registry that is where its name says, and that
// the entry of another one would take elsewhere.
func (m *maker) exceptions() {
	for _, name := range m.ordinary {
		if _, _, taken := m.Image.RegistryConfig.rule(name); taken {
			m.Image.RegistryConfig.Registries = append(m.Image.RegistryConfig.Registries, Registry{Prefix: name})
		}
	}
	if c := m.Image.RegistryConfig; c != nil {
		slices.SortStableFunc(c.Registries, func(a, b Registry) int { return compareHosts(a.Prefix, b.Prefix) })
	}
}

// hostFile is what of a hosts.toml the library does not tell (hostFileConfig in
// core/remotes/docker/config/hosts.go).
type hostFile struct {
	CA         any            `toml:"ca"`
	Client     any            `toml:"client"`
	SkipVerify bool           `toml:"skip_verify"`
	Header     map[string]any `toml:"header"`
}

// directory reads authorities out of a registry's directory, and names what a guest
// cannot be told. hosts is the number of hosts that the library found in it.
func (m *maker) directory(name, dir string, hosts int) error {
	if dir == "" {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(dir, "hosts.toml"))
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	var t struct {
		hostFile
		Hosts map[string]hostFile `toml:"host"`
	}
	if err := toml.Unmarshal(b, &t); err != nil || (len(b) > 0 && hosts != len(t.Hosts)+1) {
		m.note("%s: containerd cannot read %s, and goes on without it", name, filepath.Join(dir, "hosts.toml"))
		b = nil
	}
	if len(b) == 0 {
		return m.certFiles(name, dir)
	}
	files := append([]hostFile{t.hostFile}, slices.Collect(maps.Values(t.Hosts))...)
	var authorities, headers []string
	client, unverified := false, false
	for _, f := range files {
		authorities = append(authorities, paths(dir, f.CA)...)
		client = client || f.Client != nil
		unverified = unverified || f.SkipVerify
		headers = append(headers, slices.Collect(maps.Keys(f.Header))...)
	}
	slices.Sort(authorities)
	slices.Sort(headers)
	for _, path := range slices.Compact(authorities) {
		if err := m.authority(name, path); err != nil {
			return err
		}
	}
	if client {
		m.Credentials = true
		m.note("%s: containerd has a client certificate, which a guest cannot be given", name)
	}
	if unverified {
		m.note("%s: containerd does not verify its certificate (skip_verify), which a guest cannot be told: give containerd the authority (ca), and the guest gets it too", name)
	}
	for _, h := range slices.Compact(headers) {
		m.Credentials = m.Credentials || strings.EqualFold(h, "Authorization")
		m.note("%s: containerd sends the header %s, which a guest cannot be told", name, h)
	}
	return nil
}

// certFiles reads a directory as Docker has them (loadCertFiles in
// core/remotes/docker/config/hosts.go).
func (m *maker) certFiles(name, dir string) error {
	found, err := fs.Glob(os.DirFS(dir), "*.c*rt")
	if err != nil {
		return err
	}
	for _, f := range found {
		switch filepath.Ext(f) {
		case ".crt":
			if err := m.authority(name, filepath.Join(dir, f)); err != nil {
				return err
			}
		case ".cert":
			m.Credentials = true
			m.note("%s: containerd has a client certificate, which a guest cannot be given", name)
		}
	}
	return nil
}

// authority adds the certificates of a file, and nothing else that is in it, one by
// one: a guest reads one of each text.
func (m *maker) authority(name, path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("registry %s: read its authority: %w", name, err)
	}
	for block, rest := pem.Decode(b); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" || m.authorities[string(block.Bytes)] {
			continue
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			m.note("%s: a certificate in %s cannot be read and is left out: %v", name, path, err)
			continue
		}
		m.authorities[string(block.Bytes)] = true
		m.Image.Certificates = append(m.Image.Certificates, string(pem.EncodeToMemory(&pem.Block{Type: block.Type, Bytes: block.Bytes})))
	}
	return nil
}

// paths are the files that a value of hosts.toml names: one, or a list.
func paths(dir string, v any) (found []string) {
	list, ok := v.([]any)
	if !ok {
		list = []any{v}
	}
	for _, v := range list {
		if p, ok := v.(string); ok {
			if !filepath.IsAbs(p) {
				p = filepath.Join(dir, p)
			}
			found = append(found, p)
		}
	}
	return found
}

// credentials notes where CRI's configuration has some.
func (m *maker) credentials(only string) {
	names := map[string]bool{}
	for name, v := range m.Node.Registry.Configs {
		if t, ok := v.(map[string]any); ok && t["auth"] != nil {
			names[name] = true
		}
	}
	for name := range m.Node.Registry.Auths {
		// A URL can have a password in it.
		u, err := url.Parse(name)
		if err != nil || u.Host == "" {
			u, err = url.Parse("//" + name)
		}
		if err != nil || u.Hostname() == "" {
			m.Credentials = true
			m.note("a registry: containerd has credentials for it, and its name in auths is no URL")
			continue
		}
		names[u.Host] = true
	}
	for _, name := range sortedHosts(names) {
		if only == "" || only == name {
			m.Credentials = true
			m.note("%s: containerd has credentials for it; a guest gets its own from a key broker, by authenticated_registry_credentials_uri", name)
		}
	}
	for _, h := range slices.Sorted(maps.Keys(m.Node.Registry.Headers)) {
		m.Credentials = m.Credentials || strings.EqualFold(h, "Authorization")
		m.note("all registries: containerd sends the header %s, which a guest cannot be told", h)
	}
}

// proxies reads the variables that Go's HTTP client reads
// (golang.org/x/net/http/httpproxy, FromEnvironment).
func (m *maker) proxies() {
	get := func(names ...string) string {
		for _, n := range names {
			if m.Env[n] != "" {
				return m.Env[n]
			}
		}
		return ""
	}
	p := Proxy{
		HTTPS: m.proxy("HTTPS_PROXY", get("HTTPS_PROXY", "https_proxy")),
		HTTP:  m.proxy("HTTP_PROXY", get("HTTP_PROXY", "http_proxy")),
	}
	if p == (Proxy{}) {
		return
	}
	var no []string
	for e := range strings.SplitSeq(get("NO_PROXY", "no_proxy"), ",") {
		e = strings.TrimSpace(e)
		if e == "" {
			continue
		}
		// With a port, an entry of NO_PROXY is for that port alone. A guest
		// compares the entry with the name of the host.
		if _, port, err := net.SplitHostPort(e); err == nil && port != "" {
			m.note("NO_PROXY: %s has a port, which a guest does not know; it is left out, so that the guest uses the proxy there", e)
			continue
		}
		no = append(no, e)
	}
	p.No = strings.Join(no, ",")
	m.Image.Proxy = &p
	m.note("the proxy: a guest that is told one here takes no heed of agent.https_proxy and agent.no_proxy in its kernel_params")
}

func (m *maker) proxy(variable, value string) string {
	if value == "" {
		return ""
	}
	u, err := url.Parse(value)
	if err != nil || u.Host == "" {
		u, err = url.Parse("http://" + value)
	}
	switch {
	case err != nil || u.Host == "":
		m.note("%s: it is no URL, and containerd fails with it", variable)
		return ""
	case u.Scheme != "http" && u.Scheme != "https":
		m.note("%s: a guest knows no proxy of the kind %s; it asks registries directly", variable, u.Scheme)
		return ""
	}
	if u.User != nil {
		m.Credentials = true
		m.note("%s: containerd has credentials for the proxy %s, which a guest cannot be given safely: init data is no secret", variable, u.Host)
	}
	return (&url.URL{Scheme: u.Scheme, Host: u.Host}).String()
}

// hostOfDir is the host that a directory's name stands for: a colon cannot stand in
// every file name, so that "host_5000_" is host:5000.
func hostOfDir(name string) string {
	if s, ok := strings.CutSuffix(name, "_"); ok && name != defaultDir {
		if i := strings.LastIndex(s, "_"); i > 0 {
			return s[:i] + ":" + s[i+1:]
		}
	}
	return name
}

func isDockerHub(name, host string) bool {
	return name == "docker.io" && slices.Contains([]string{"registry-1.docker.io", "index.docker.io", "docker.io"}, host)
}

// sortedHosts sorts by length first. image-rs looks for a prefix anywhere in a name,
// takes the match that ends last and, of several, the last one of the list: with
// a.example before x.a.example, each gets its own.
func sortedHosts(names map[string]bool) []string {
	return slices.SortedFunc(maps.Keys(names), compareHosts)
}

func compareHosts(a, b string) int {
	return cmp.Or(len(a)-len(b), strings.Compare(a, b))
}
