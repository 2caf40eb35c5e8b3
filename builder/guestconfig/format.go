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

package guestconfig

import (
	"bytes"
	"compress/gzip"
	"encoding/base64"
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
)

// Annotation is the pod's annotation that carries init data.
const Annotation = "io.katacontainers.config.hypervisor.cc_init_data"

// Placeholder is what stands for the credentials that the node has and a guest has
// to get elsewhere.
const Placeholder = "kbs:///REPOSITORY/TYPE/TAG"

// Format is how a result is written.
type Format string

const (
	// CDH is the section [image] of cdh.toml.
	CDH Format = "cdh"
	// InitData is a whole init data, with a cdh.toml that has the section.
	InitData Format = "initdata"
	// AnnotationValue is that, as the value of Annotation.
	AnnotationValue Format = "annotation"
)

// Formats are all of them.
var Formats = []Format{CDH, InitData, AnnotationValue}

// KBC is the section [kbc] of cdh.toml, without which CDH refuses the file.
type KBC struct {
	Name string `toml:"name"`
	URL  string `toml:"url,omitempty"`
}

// Encode writes the result. kbsURL is where the guest finds its key broker; ""
// leaves it without one.
func (r Result) Encode(f Format, kbsURL string) ([]byte, error) {
	switch f {
	case CDH:
		return r.cdh(nil)
	case InitData:
		return r.initData(kbsURL)
	case AnnotationValue:
		text, err := r.initData(kbsURL)
		if err != nil {
			return nil, err
		}
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		if _, err := z.Write(text); err != nil {
			return nil, err
		}
		if err := z.Close(); err != nil {
			return nil, err
		}
		return []byte(base64.StdEncoding.EncodeToString(b.Bytes()) + "\n"), nil
	default:
		return nil, fmt.Errorf("format %q: want one of %v: %w", f, Formats, errdefs.ErrInvalidArgument)
	}
}

// cdh writes cdh.toml, with a key broker if there is one.
func (r Result) cdh(kbc *KBC) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString("# From containerd's configuration, by containerd guest-pull guest-config.\n")
	for _, n := range r.Notes {
		// A name of a file can have anything in it, and a comment cannot.
		fmt.Fprintf(&b, "# %s\n", strings.Map(func(r rune) rune {
			if unicode.IsControl(r) {
				return unicode.ReplacementChar
			}
			return r
		}, n))
	}
	if kbc != nil {
		text, err := toml.Marshal(map[string]any{"kbc": kbc})
		if err != nil {
			return nil, err
		}
		b.WriteByte('\n')
		b.Write(text)
	}
	image := r.Image
	if r.Credentials && image.CredentialsURI == "" {
		fmt.Fprintf(&b, "\n# For the section [image]; put the place of the guest's credentials in:\n# authenticated_registry_credentials_uri = %q\n", Placeholder)
	}
	text, err := toml.Marshal(image)
	if err != nil || len(text) == 0 {
		return b.Bytes(), err
	}
	b.WriteString("\n[image]\n")
	if image.CredentialsURI != "" {
		fmt.Fprintf(&b, "authenticated_registry_credentials_uri = %q\n", image.CredentialsURI)
	}
	if len(image.Certificates) > 0 {
		// As a person can read them; base64 needs no quoting.
		fmt.Fprintf(&b, "extra_root_certificates = [\"\"\"\n%s\"\"\"]\n", strings.Join(image.Certificates, "\"\"\", \"\"\"\n"))
	}
	image.CredentialsURI, image.Certificates = "", nil
	text, err = toml.Marshal(map[string]any{"image": image})
	if err != nil {
		return nil, err
	}
	b.Write(bytes.TrimPrefix(text, []byte("[image]\n")))
	return b.Bytes(), nil
}

// initDataFile is init data (InitData in kata-containers/kata-containers,
// src/libs/kata-types/src/initdata.rs).
type initDataFile struct {
	Version   string            `toml:"version"`
	Algorithm string            `toml:"algorithm"`
	Data      map[string]string `toml:"data"`
}

const cdhKey = "cdh.toml"

func (r Result) initData(kbsURL string) ([]byte, error) {
	kbc := &KBC{Name: "offline_fs_kbc"}
	if kbsURL != "" {
		kbc = &KBC{Name: "cc_kbc", URL: kbsURL}
	}
	cdh, err := r.cdh(kbc)
	if err != nil {
		return nil, err
	}
	// As a person writes it, where that is possible.
	if !bytes.Contains(cdh, []byte("'''")) {
		return fmt.Appendf(nil, "version = \"0.1.0\"\nalgorithm = \"sha256\"\n\n[data]\n%q = '''\n%s'''\n", cdhKey, cdh), nil
	}
	return toml.Marshal(initDataFile{Version: "0.1.0", Algorithm: "sha256", Data: map[string]string{cdhKey: string(cdh)}})
}

// Parse reads what a guest is configured with: cdh.toml, init data, or the value of
// the annotation. What is none of these gives errdefs.ErrInvalidArgument.
func Parse(text []byte) (Image, error) {
	if packed, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(text))); err == nil && len(packed) > 0 {
		z, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return Image{}, fmt.Errorf("base64 of something that is not compressed: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		// Far more than init data can be.
		if text, err = io.ReadAll(io.LimitReader(z, 16<<20)); err != nil {
			return Image{}, fmt.Errorf("decompress: %w: %w", err, errdefs.ErrInvalidArgument)
		}
	}
	var t struct {
		Data  map[string]string `toml:"data"`
		Image Image             `toml:"image"`
	}
	if err := toml.Unmarshal(text, &t); err != nil {
		return Image{}, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	if t.Data == nil {
		return t.Image, nil
	}
	var cdh struct {
		Image Image `toml:"image"`
	}
	if err := toml.Unmarshal([]byte(t.Data[cdhKey]), &cdh); err != nil {
		return Image{}, fmt.Errorf("%s in the init data: %w: %w", cdhKey, err, errdefs.ErrInvalidArgument)
	}
	return cdh.Image, nil
}
