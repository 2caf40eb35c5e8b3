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

// Package images makes container images on the fly: small ones that run a
// shell, with as many layers, of such sizes and encodings as a test needs.
//
// The same [Spec] gives the same image, byte for byte.
package images

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Encoding is how the layers of an image are stored.
type Encoding string

// The encodings.
const (
	Gzip         Encoding = "gzip"
	Zstd         Encoding = "zstd"
	Uncompressed Encoding = "uncompressed"
	// Encrypted layers have a media type that ends in "+encrypted" and hold
	// random bytes: nobody has the key.
	Encrypted Encoding = "encrypted"
)

// Spec describes an image. The zero value of every field but Name has a
// meaning.
type Spec struct {
	// Name sets the image apart from others: it goes into the top layer, in
	// the file /etc/image-name, and seeds the random contents.
	Name string
	// Layers is the number of layers; 0 means 1. The lowest one has a shell.
	// It is the same in all images of the same encoding and accounts that
	// have more than one layer.
	Layers int
	// LayerSize is the number of random bytes in each layer but the lowest;
	// 0 means 16 KiB. They do not compress.
	LayerSize int
	// Encoding of all the layers; "" means Gzip.
	Encoding Encoding
	// Architecture is "" for this machine's.
	Architecture string

	// Passwd and Group are the contents of /etc/passwd and /etc/group; ""
	// means files with root, nobody and app (1000:1000).
	Passwd, Group string
	// NoUsers leaves both files out.
	NoUsers bool
	// Top are the files of more layers, on top of those that Layers counts.
	Top [][]File

	// User, Env, Entrypoint, Cmd, WorkingDir, Volumes and Labels are the
	// image's configuration. Without Entrypoint and Cmd the image prints
	// "hello from <Name>" and waits for SIGTERM.
	User            string
	Env             []string
	Entrypoint, Cmd []string
	WorkingDir      string
	Volumes         []string
	Labels          map[string]string
}

const (
	defaultPasswd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1000:app:/:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n"
	defaultGroup  = "root:x:0:\napp:x:1000:\nextra:x:2000:app\nnogroup:x:65534:\n"
)

// Build makes the image.
func Build(s Spec) (v1.Image, error) {
	if s.Name == "" {
		return nil, errors.New("images: an image needs a name")
	}
	shell, err := Busybox()
	if err != nil {
		return nil, err
	}
	s.Layers = max(s.Layers, 1)
	if s.LayerSize == 0 {
		s.LayerSize = 16 << 10
	}
	if s.Passwd == "" {
		s.Passwd = defaultPasswd
	}
	if s.Group == "" {
		s.Group = defaultGroup
	}
	if len(s.Entrypoint) == 0 && len(s.Cmd) == 0 {
		s.Cmd = []string{"/bin/sh", "-c", "trap 'exit 0' TERM; echo hello from " + s.Name + "; tail -f /dev/null & wait"}
	}

	base := []file{
		dir("bin"), dir("dev"), dir("etc"), dir("proc"), dir("sys"), dir("root"), dir("run"), dir("var"),
		{name: "tmp", mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{name: "bin/busybox", mode: 0o755, data: shell},
	}
	if !s.NoUsers {
		base = append(base,
			file{name: "etc/passwd", mode: 0o644, data: []byte(s.Passwd)},
			file{name: "etc/group", mode: 0o644, data: []byte(s.Group)})
	}
	for _, a := range applets {
		base = append(base, file{name: "bin/" + a, mode: fs.ModeSymlink | 0o777, link: "busybox"})
	}
	random := rand.NewChaCha8(seed(s.Name))
	var layers []v1.Layer
	for i := range s.Layers {
		var files []file
		if i == 0 {
			files = base
		} else {
			data := make([]byte, s.LayerSize)
			random.Read(data) // never fails
			files = []file{dir("data"), {name: fmt.Sprintf("data/%02d", i), mode: 0o644, data: data}}
		}
		if i == s.Layers-1 {
			files = append(files, file{name: "etc/image-name", mode: 0o644, data: []byte(s.Name + "\n")})
		}
		l, err := layer(files, s.Encoding, random)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}
	for _, top := range s.Top {
		var files []file
		for _, f := range top {
			files = append(files, file{name: f.Name, mode: f.Mode, data: []byte(f.Data), link: f.Link, hard: f.Hard, owner: f.Owner})
		}
		l, err := layer(files, s.Encoding, random)
		if err != nil {
			return nil, err
		}
		layers = append(layers, l)
	}

	cfg := v1.Config{
		User:       s.User,
		Env:        append([]string{"PATH=/bin"}, s.Env...),
		Entrypoint: s.Entrypoint,
		Cmd:        s.Cmd,
		WorkingDir: s.WorkingDir,
		Labels:     s.Labels,
	}
	if len(s.Volumes) > 0 {
		cfg.Volumes = map[string]struct{}{}
		for _, v := range s.Volumes {
			cfg.Volumes[v] = struct{}{}
		}
	}
	return assemble(layers, cfg, s.Architecture)
}

// Pause makes an image for the container that holds a pod's namespaces: it
// does nothing until it is killed.
func Pause() (v1.Image, error) {
	shell, err := Busybox()
	if err != nil {
		return nil, err
	}
	l, err := layer([]file{{name: "busybox", mode: 0o755, data: shell}, dir("dev"), dir("proc"), dir("sys"), dir("etc")}, Gzip, nil)
	if err != nil {
		return nil, err
	}
	return assemble([]v1.Layer{l}, v1.Config{
		User:       "65535:65535",
		Entrypoint: []string{"/busybox", "tail", "-f", "/dev/null"},
	}, "")
}

// Index makes a multi-platform index of an image for this machine's platform,
// of images that say they are for other platforms, and of an attestation manifest for
// each, in the form that buildkit gives them.
func Index(image v1.Image) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	add := func(img v1.Image, p *v1.Platform) error {
		digest, err := img.Digest()
		if err != nil {
			return err
		}
		statement := fmt.Appendf(nil, `{"_type":"https://in-toto.io/Statement/v0.1","subject":[{"digest":{"sha256":%q}}]}`, digest.Hex)
		attestation, err := assemble([]v1.Layer{static.NewLayer(statement, "application/vnd.in-toto+json")}, v1.Config{}, "unknown")
		if err != nil {
			return err
		}
		index = mutate.AppendManifests(index,
			mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: p}},
			mutate.IndexAddendum{Add: attestation, Descriptor: v1.Descriptor{
				Platform: &v1.Platform{OS: "unknown", Architecture: "unknown"},
				Annotations: map[string]string{
					"vnd.docker.reference.type":   "attestation-manifest",
					"vnd.docker.reference.digest": digest.String(),
				},
			}})
		return nil
	}
	for _, arch := range []string{"amd64", "arm64", "s390x", "ppc64le"} {
		if arch == runtime.GOARCH {
			continue
		}
		other, err := Build(Spec{Name: "for-" + arch, Architecture: arch, Layers: 2})
		if err != nil {
			return nil, err
		}
		if err := add(other, &v1.Platform{OS: "linux", Architecture: arch}); err != nil {
			return nil, err
		}
	}
	// Not the first one, so that nobody gets it right by taking the first.
	if err := add(image, &v1.Platform{OS: "linux", Architecture: runtime.GOARCH}); err != nil {
		return nil, err
	}
	return index, nil
}

// LayerDigests returns the digests of an image's layers, lowest first.
func LayerDigests(img v1.Image) ([]string, error) {
	layers, err := img.Layers()
	if err != nil {
		return nil, err
	}
	digests := make([]string, 0, len(layers))
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			return nil, err
		}
		digests = append(digests, d.String())
	}
	return digests, nil
}

// LayersSize returns the sum of the stored sizes of an image's layers.
func LayersSize(img v1.Image) (int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return 0, err
	}
	var n int64
	for _, l := range m.Layers {
		n += l.Size
	}
	return n, nil
}

func assemble(layers []v1.Layer, cfg v1.Config, arch string) (v1.Image, error) {
	osName := "linux"
	switch arch {
	case "":
		arch = runtime.GOARCH
	case "unknown":
		osName = "unknown"
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	created := v1.Time{Time: time.Unix(0, 0).UTC()}
	img, err := mutate.ConfigFile(img, &v1.ConfigFile{
		Architecture: arch,
		OS:           osName,
		Created:      created,
		Config:       cfg,
		RootFS:       v1.RootFS{Type: "layers", DiffIDs: []v1.Hash{}},
	})
	if err != nil {
		return nil, err
	}
	for _, l := range layers {
		img, err = mutate.Append(img, mutate.Addendum{Layer: l, History: v1.History{Created: created, CreatedBy: "guest-pull tests"}})
		if err != nil {
			return nil, err
		}
	}
	return img, nil
}

// File is a file of a layer. One with the name ".wh.x" removes x of the layers
// below, ".wh..wh..opq" all that is in its directory there.
type File struct {
	Name string // without leading slash
	Mode fs.FileMode
	Data string
	Link string // the target of a link, which is symbolic unless Hard is set
	Hard bool
	// Owner is its user and its group.
	Owner int
}

type file struct {
	name  string
	mode  fs.FileMode
	data  []byte
	link  string
	hard  bool
	owner int
}

func dir(name string) file { return file{name: name, mode: fs.ModeDir | 0o755} }

func layer(files []file, enc Encoding, random io.Reader) (v1.Layer, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: int64(f.mode.Perm()), Size: int64(len(f.data)), Typeflag: tar.TypeReg, ModTime: time.Unix(0, 0), Uid: f.owner, Gid: f.owner}
		switch {
		case f.mode.IsDir():
			h.Typeflag, h.Name = tar.TypeDir, f.name+"/"
		case f.hard:
			h.Typeflag, h.Linkname = tar.TypeLink, f.link
		case f.mode&fs.ModeSymlink != 0 || f.link != "":
			h.Typeflag, h.Linkname = tar.TypeSymlink, f.link
		}
		if f.mode&fs.ModeSticky != 0 {
			h.Mode |= 0o1000
		}
		if err := tw.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := tw.Write(f.data); err != nil {
			return nil, err
		}
	}
	if err := tw.Close(); err != nil {
		return nil, err
	}

	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(buf.Bytes())), nil }
	switch enc {
	case Gzip, "":
		return tarball.LayerFromOpener(open, tarball.WithMediaType(types.OCILayer), tarball.WithCompressedCaching)
	case Zstd:
		return tarball.LayerFromOpener(open, tarball.WithCompression(compression.ZStd),
			tarball.WithMediaType(types.OCILayerZStd), tarball.WithCompressedCaching)
	case Uncompressed:
		return static.NewLayer(buf.Bytes(), types.OCIUncompressedLayer), nil
	case Encrypted:
		secret := make([]byte, buf.Len())
		if _, err := io.ReadFull(random, secret); err != nil {
			return nil, err
		}
		return static.NewLayer(secret, types.OCILayer+"+encrypted"), nil
	default:
		return nil, fmt.Errorf("images: unknown encoding %q", enc)
	}
}

// Busybox returns a statically linked busybox: the one that BUSYBOX names, or
// /bin/busybox.
var Busybox = sync.OnceValues(func() ([]byte, error) {
	if path := os.Getenv("BUSYBOX"); path != "" {
		return staticBinary(path)
	}
	return staticBinary("/bin/busybox")
})

func staticBinary(path string) ([]byte, error) {
	const remedy = "install the package busybox-static (apt-get install busybox-static), or let BUSYBOX name a static busybox"
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("images: the test images need a shell: %w; %s", err, remedy)
	}
	bin, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("images: %s: %w; %s", path, err, remedy)
	}
	if slices.ContainsFunc(bin.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP }) {
		return nil, fmt.Errorf("images: %s is linked dynamically and cannot run alone in an image; %s", path, remedy)
	}
	return data, nil
}

var applets = strings.Fields(`cat chmod chown cp dd df echo env false find cut du grep head hostname id kill ln ls
	mkdir mount mv nc printf ps pwd readlink rm sed sh sha256sum sleep sort stat sync tail tar test touch tr
	true uname uniq wc wget whoami`)

func seed(name string) (s [32]byte) {
	h := fnv.New128a()
	io.WriteString(h, name) // never fails
	h.Sum(s[:0])
	return s
}
