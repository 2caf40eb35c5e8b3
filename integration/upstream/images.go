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

package main

import (
	"archive/tar"
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"runtime"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// hosts are the registries of the suites' images. In the sandbox they are the
// machine itself.
var hosts = []string{"ghcr.io", "registry.k8s.io", "k8s.gcr.io", "gcr.io"}

// serveImages serves the images that the suites use under their own names, over
// TLS. It returns the registry behind it and the certificate, in PEM, that
// clients have to trust.
// The program is one that says as whom it runs.
func serveImages(noNewPrivs string) (*registry.Registry, []byte, error) {
	reg, err := registry.Start()
	if err != nil {
		return nil, nil, err
	}
	if err := pushImages(reg, noNewPrivs); err != nil {
		return nil, nil, err
	}
	certificate, trusted, err := selfSigned()
	if err != nil {
		return nil, nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:443")
	if err != nil {
		return nil, nil, err
	}
	behind, err := url.Parse(reg.URL())
	if err != nil {
		return nil, nil, err
	}
	server := &http.Server{
		Handler:           httputil.NewSingleHostReverseProxy(behind),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          log.New(io.Discard, "", 0),
	}
	go server.Serve(tls.NewListener(l, &tls.Config{ // ends with the sandbox
		Certificates: []tls.Certificate{certificate},
		MinVersion:   tls.VersionTLS12,
	}))
	return reg, trusted, nil
}

func selfSigned() (tls.Certificate, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	c := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "guest-pull upstream test registry"},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:              hosts,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		return tls.Certificate{}, nil, err
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key},
		pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// pushImages makes images that do what the suites need of the real ones.
func pushImages(reg *registry.Registry, noNewPrivs string) error {
	applets, err := busyboxApplets()
	if err != nil {
		return err
	}
	shell, err := images.Build(images.Spec{
		Name: "busybox", Layers: 2, Cmd: []string{"sh"},
		// The suites use these users and groups of the real busybox's.
		Passwd: accounts("root:0:0", "daemon:1:1", "bin:2:2", "sys:3:3", "sync:4:100", "mail:8:8", "www-data:33:33", "operator:37:37", "nobody:65534:65534"),
		Group:  groups("root:0", "daemon:1", "bin:2", "sys:3", "adm:4", "tty:5", "disk:6", "lp:7", "mail:8", "wheel:10:root", "www-data:33", "operator:37", "users:100", "nogroup:65534"),
	})
	if err != nil {
		return err
	}
	if shell, err = withFiles(shell, applets, nil); err != nil {
		return err
	}
	alpine, err := withFiles(shell, []entry{
		{name: "etc/os-release", mode: 0o644, data: "NAME=\"Alpine Linux\"\nID=alpine\n"},
		{name: "bin/sh", link: "/bin/busybox"}, // an absolute link, as the real one's
	}, nil)
	if err != nil {
		return err
	}
	copyUp, err := withFiles(shell, []entry{
		{name: "test_dir/", mode: 0o755},
		{name: "test_dir/test_file", mode: 0o644, data: "test_content\n"},
		{name: "C:/", mode: 0o755},
		{name: "C:/weird_test_dir/", mode: 0o755},
		{name: "C:/weird_test_dir/weird_test_file", mode: 0o644, data: "test_content\n"},
		{name: ":colon_prefixed/", mode: 0o755},
		{name: ":colon_prefixed/colon_prefixed_file", mode: 0o644, data: "test_content\n"},
	}, []string{"/test_dir", "C:/weird_test_dir", "/:colon_prefixed"})
	if err != nil {
		return err
	}
	ownership, err := withFiles(shell, []entry{
		// The pull progress cases need one layer of more than 3 MB.
		{name: "filler", mode: 0o644, data: filler(4 << 20)},
		{name: "test_dir/", mode: 0o755, uid: 65534, gid: 65534},
	}, []string{"/test_dir"})
	if err != nil {
		return err
	}
	pause, err := images.Pause()
	if err != nil {
		return err
	}
	// For the cases that look for the program by its name in the real image.
	if pause, err = withFiles(pause, []entry{{name: "pause", mode: 0o755, data: "not run"}}, nil); err != nil {
		return err
	}
	// One case counts the names of this one.
	otherPause, err := withFiles(pause, []entry{{name: "version", mode: 0o644, data: "3.9"}}, nil)
	if err != nil {
		return err
	}
	whiteout, err := withFiles(shell, []entry{
		{name: "file-to-delete", mode: 0o644},
		{name: "dir-to-delete/", mode: 0o755},
		{name: "dir-to-delete/file", mode: 0o644},
	}, nil)
	if err != nil {
		return err
	}
	if whiteout, err = withFiles(whiteout, []entry{{name: ".wh.file-to-delete"}, {name: ".wh.dir-to-delete"}}, nil); err != nil {
		return err
	}
	all, err := critestImages(shell, noNewPrivs)
	if err != nil {
		return err
	}
	maps.Copy(all, map[string]v1.Image{
		"containerd/alpine:3.14.0":               alpine,
		"containerd/busybox:1.36":                shell,
		"containerd/nginx:1.27.0":                shell,
		"containerd/volume-copy-up:2.1":          copyUp,
		"containerd/volume-copy-up:2.2":          copyUp,
		"containerd/volume-ownership:2.1":        ownership,
		"containerd/whiteout-test:1.0":           whiteout, // of 2.3
		"pause:3.6":                              pause,
		"pause:3.10.2":                           pause,
		"e2e-test-images/busybox:1.29-2":         shell,
		"e2e-test-images/resource-consumer:1.10": shell,
		"pause:3.9":                              otherPause,
	})
	for name, img := range all {
		index, err := multiPlatform(name, img)
		if err != nil {
			return err
		}
		if _, err := reg.Push(name, index); err != nil {
			return err
		}
	}
	return nil
}

func busyboxApplets() ([]entry, error) {
	out, err := exec.Command("busybox", "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("list what busybox can do: %w; install the package busybox-static", err)
	}
	files := []entry{{name: "home/", mode: 0o755}, {name: "usr/", mode: 0o755}, {name: "usr/sbin/", mode: 0o755}}
	for a := range strings.FieldsSeq(string(out)) {
		if a != "busybox" && a != "nc" {
			files = append(files, entry{name: "bin/" + a, link: "busybox"})
		}
	}
	// Debian's has not these.
	for name, script := range map[string]string{
		"pgrep": `for p in /proc/[0-9]*; do if [ "$(cat $p/comm 2>/dev/null)" = "$1" ]; then echo ${p#/proc/}; found=1; fi; done; [ "$found" ]`,
		"ipcs":  `exec cat /proc/sysvipc/shm`,
	} {
		files = append(files, entry{name: "bin/" + name, mode: 0o755, data: "#!/bin/sh\n" + script + "\n"})
	}
	// Debian's nc does not handle SIGTERM, so that it would not end as process 1.
	return append(files, entry{name: "bin/nc", mode: 0o755, data: "#!/bin/sh\ntrap 'exit 143' TERM\nbusybox nc \"$@\" &\nwait $!\n"}), nil
}

func accounts(list ...string) string {
	var b strings.Builder
	for _, a := range list {
		f := strings.Split(a, ":")
		fmt.Fprintf(&b, "%s:x:%s:%s:%s:/:/bin/sh\n", f[0], f[1], f[2], f[0])
	}
	return b.String()
}

func groups(list ...string) string {
	var b strings.Builder
	for _, g := range list {
		f := append(strings.Split(g, ":"), "") // without members
		fmt.Fprintf(&b, "%s:x:%s:%s\n", f[0], f[1], f[2])
	}
	return b.String()
}

// filler does not compress.
func filler(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails
	return string(b)
}

type entry struct {
	name     string // a directory's ends in a slash
	mode     int64
	uid, gid int
	data     string
	link     string
}

// withFiles adds a layer, and volumes.
func withFiles(img v1.Image, files []entry, volumes []string) (v1.Image, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.gid, Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0)}
		switch {
		case f.link != "":
			h.Typeflag, h.Linkname, h.Mode = tar.TypeSymlink, f.link, 0o777
		case strings.HasSuffix(f.name, "/"):
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.data); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	if err != nil {
		return nil, err
	}
	if img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{CreatedBy: "guest-pull tests"}}); err != nil {
		return nil, err
	}
	if len(volumes) == 0 {
		return img, nil
	}
	cfg, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cfg = cfg.DeepCopy()
	cfg.Config.Volumes = map[string]struct{}{}
	for _, v := range volumes {
		cfg.Config.Volumes[v] = struct{}{}
	}
	return mutate.ConfigFile(img, cfg)
}

// multiPlatform makes an index of an image and of the same for platforms that
// this machine is not, as the real ones are.
func multiPlatform(name string, img v1.Image) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range []v1.Platform{
		{OS: "linux", Architecture: "amd64"},
		{OS: "linux", Architecture: "arm64", Variant: "v8"},
		{OS: "linux", Architecture: "arm", Variant: "v7"},
		{OS: "linux", Architecture: "ppc64le"},
		{OS: "linux", Architecture: "s390x"},
	} {
		cfg, err := img.ConfigFile()
		if err != nil {
			return nil, err
		}
		cfg = cfg.DeepCopy()
		cfg.Architecture, cfg.Variant = p.Architecture, p.Variant
		one, err := mutate.ConfigFile(img, cfg)
		if err != nil {
			return nil, err
		}
		// Otherwise whoever has one has the layers of all.
		if p.Architecture != runtime.GOARCH {
			if one, err = withFiles(one, []entry{{name: "platform", mode: 0o644, data: name + " for " + p.String()}}, nil); err != nil {
				return nil, err
			}
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{Add: one, Descriptor: v1.Descriptor{Platform: &p}})
	}
	return index, nil
}
