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

package images

import (
	"archive/tar"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"path"
	"runtime"
	"slices"
	"strings"
	"sync"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Shape says how an image is written down: its manifests, media types, platforms
// and annotations, where [Spec] says what is in it. What is in it is always the
// same: a shell that prints [Shape.Greeting] and waits for SIGTERM. The zero value
// is a plain image for this machine with one gzip layer.
type Shape struct {
	// NoLayers leaves out the layers.
	NoLayers bool `json:",omitempty"`
	// More is the number of layers besides the lowest, which has the shell.
	More int `json:",omitempty"`
	// Encoding of the layers; "" means Gzip.
	Encoding Encoding `json:",omitempty"`
	// Docker gives the manifests, the config and the layers the media types of
	// Docker instead of OCI's.
	Docker bool `json:",omitempty"`
	// SameTwice has the top layer twice.
	SameTwice bool `json:",omitempty"`
	// LayerType is the media type of the top layer, instead of the right one.
	LayerType string `json:",omitempty"`
	// Blobs are the media types of more blobs among the layers, which are no
	// layers: the config knows nothing of them.
	Blobs []string `json:",omitempty"`

	// ConfigType is the media type of the config, instead of the right one.
	ConfigType string `json:",omitempty"`
	// ArtifactType makes it an artifact: the manifest has this type and the
	// config is the empty one.
	ArtifactType string `json:",omitempty"`
	// OS, Architecture, Variant and OSFeatures are what the config claims; ""
	// means linux and this machine's.
	OS           string   `json:",omitempty"`
	Architecture string   `json:",omitempty"`
	Variant      string   `json:",omitempty"`
	OSFeatures   []string `json:",omitempty"`
	// Annotations of each layer, and of the manifest.
	Annotations map[string]string `json:",omitempty"`
	// User is the config's; "" means 1000:1000.
	User string `json:",omitempty"`
	// ConfigSize is the least number of bytes of the config.
	ConfigSize int `json:",omitempty"`

	// Indexes is how many indexes are around the manifest, one in the other.
	Indexes int `json:",omitempty"`
	// The others are about the innermost index, and nothing without one.

	// NoPlatform leaves the platform out of the image's descriptor.
	NoPlatform bool `json:",omitempty"`
	// Twin is the encoding of a second manifest for the same platform, with
	// the same config. TwinFirst puts it before the other.
	Twin      Encoding `json:",omitempty"`
	TwinFirst bool     `json:",omitempty"`
	// OtherPlatforms adds images for other platforms, before this one.
	OtherPlatforms bool `json:",omitempty"`
	// OnlyOthers leaves the image itself out.
	OnlyOthers bool `json:",omitempty"`
	// Attestations adds an attestation manifest, in the form that buildkit
	// gives it.
	Attestations bool `json:",omitempty"`
	// Companion adds an artifact without a platform, behind all others.
	Companion bool `json:",omitempty"`
}

// Greeting is what an image of that name prints when it runs, without the user's
// number at its end.
func (Shape) Greeting(name string) string { return "hello from " + name + " as " }

// Content is what a registry has of an image: its manifests and indexes, and the
// blobs that they name.
type Content struct {
	Root ocispec.Descriptor
	// Images are the manifests that a client on this machine may choose.
	Images []ocispec.Descriptor
	// Config is the image's.
	Config ocispec.Descriptor
	// Needed are the digests that a client on this machine has reason to ask
	// for to find the image and its config.
	Needed map[string]bool
	// ChainID is that of the image's layers; "" without any.
	ChainID string
	// Layers are the digests of all blobs that some manifest has as a layer.
	Layers []string

	blobs     map[digest.Digest][]byte
	manifests []manifest // what is named comes before what names it
}

type manifest struct {
	desc ocispec.Descriptor
	data []byte
}

// Store is what content is put into.
type Store interface {
	PutBlob(digest string, data []byte) error
	PutManifest(repository, reference, mediaType string, data []byte) error
}

// Size returns the sum of the sizes of all manifests and blobs.
func (c *Content) Size() int64 {
	var n int64
	for _, m := range c.manifests {
		n += m.desc.Size
	}
	for _, b := range c.blobs {
		n += int64(len(b))
	}
	return n
}

// Put stores the content in a repository, by a tag.
func (c *Content) Put(s Store, repository, tag string) error {
	for d, data := range c.blobs {
		if err := s.PutBlob(d.String(), data); err != nil {
			return err
		}
	}
	for _, m := range c.manifests {
		if err := s.PutManifest(repository, m.desc.Digest.String(), m.desc.MediaType, m.data); err != nil {
			return err
		}
		if m.desc.Digest == c.Root.Digest {
			if err := s.PutManifest(repository, tag, m.desc.MediaType, m.data); err != nil {
				return err
			}
		}
	}
	return nil
}

// WriteArchive writes the content as an OCI archive of an image with that
// reference.
func (c *Content) WriteArchive(w io.Writer, ref string) error {
	tw := tar.NewWriter(w)
	add := func(name string, data []byte) error {
		err := tw.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data)), Typeflag: tar.TypeReg})
		if err == nil {
			_, err = tw.Write(data)
		}
		return err
	}
	root := c.Root
	root.Annotations = map[string]string{"io.containerd.image.name": ref}
	index, err := json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{root},
	})
	if err != nil {
		return err
	}
	errs := []error{
		add(ocispec.ImageLayoutFile, []byte(`{"imageLayoutVersion":"`+ocispec.ImageLayoutVersion+`"}`)),
		add(ocispec.ImageIndexFile, index),
	}
	blob := func(d digest.Digest, data []byte) {
		errs = append(errs, add(path.Join(ocispec.ImageBlobsDir, d.Algorithm().String(), d.Encoded()), data))
	}
	for d, data := range c.blobs {
		blob(d, data)
	}
	for _, m := range c.manifests {
		blob(m.desc.Digest, m.data)
	}
	return errors.Join(append(errs, tw.Close())...)
}

func (c *Content) addBlob(mediaType string, data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	c.blobs[d] = data
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func (c *Content) addManifest(mediaType string, v any) (ocispec.Descriptor, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	c.manifests = append(c.manifests, manifest{desc, data})
	return desc, nil
}

func (c *Content) addImage(mediaType, artifactType string, annotations map[string]string, config ocispec.Descriptor, layers []ocispec.Descriptor) (ocispec.Descriptor, error) {
	for _, l := range layers {
		c.Layers = append(c.Layers, l.Digest.String())
	}
	return c.addManifest(mediaType, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType, ArtifactType: artifactType,
		Annotations: annotations, Config: config, Layers: append([]ocispec.Descriptor{}, layers...),
	})
}

const (
	dockerManifest = "application/vnd.docker.distribution.manifest.v2+json"
	dockerIndex    = "application/vnd.docker.distribution.manifest.list.v2+json"
	dockerConfig   = "application/vnd.docker.container.image.v1+json"
)

func layerType(enc Encoding, docker bool) string {
	t := map[Encoding]string{
		Gzip:         ocispec.MediaTypeImageLayerGzip,
		Zstd:         ocispec.MediaTypeImageLayerZstd,
		Uncompressed: ocispec.MediaTypeImageLayer,
		Encrypted:    ocispec.MediaTypeImageLayerGzip + "+encrypted",
	}[enc]
	if docker {
		t = "application/vnd.docker.image.rootfs.diff.tar" + map[Encoding]string{Gzip: ".gzip", Zstd: ".zstd"}[enc]
	}
	return t
}

// Build makes the content of an image. Images of different names share the lowest
// layer, and those without more layers all of them.
func (s Shape) Build(name string) (*Content, error) {
	c := &Content{Needed: map[string]bool{}, blobs: map[digest.Digest][]byte{}}
	need := func(descs ...ocispec.Descriptor) {
		for _, d := range descs {
			c.Needed[d.Digest.String()] = true
		}
	}
	if s.Encoding == "" {
		s.Encoding = Gzip
	}
	types := struct{ manifest, index, config string }{ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageConfig}
	if s.Docker {
		types.manifest, types.index, types.config = dockerManifest, dockerIndex, dockerConfig
	}
	layers, diffIDs, err := s.layers(c, name, s.Encoding)
	if err != nil {
		return nil, err
	}
	if len(diffIDs) > 0 {
		c.ChainID = identity.ChainID(diffIDs).String()
	}

	config, err := s.config(name, diffIDs)
	if err != nil {
		return nil, err
	}
	configType := types.config
	if s.ConfigType != "" {
		configType = s.ConfigType
	}
	configDesc := c.addBlob(configType, config)
	if s.ArtifactType != "" {
		configDesc = c.addBlob(ocispec.MediaTypeEmptyJSON, []byte("{}"))
	}
	if c.Root, err = c.addImage(types.manifest, s.ArtifactType, s.Annotations, configDesc, layers); err != nil {
		return nil, err
	}
	c.Images, c.Config = []ocispec.Descriptor{c.Root}, configDesc
	need(c.Root, configDesc)
	if s.Indexes == 0 {
		return c, nil
	}

	here := &ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}
	platform := here
	if s.NoPlatform {
		platform = nil
	}
	if s.Twin != "" {
		twins, _, err := s.layers(c, name, s.Twin)
		if err != nil {
			return nil, err
		}
		twin, err := c.addImage(types.manifest, s.ArtifactType, s.Annotations, configDesc, twins)
		if err != nil {
			return nil, err
		}
		c.Images = append(c.Images, twin)
		need(twin)
		if s.TwinFirst {
			slices.Reverse(c.Images)
		}
	}
	for i := range c.Images {
		c.Images[i].Platform = platform
	}
	var entries []ocispec.Descriptor
	if s.OtherPlatforms || s.OnlyOthers {
		for _, arch := range []string{"s390x", "ppc64le"} {
			other, err := s.other(c, name, arch)
			if err != nil {
				return nil, err
			}
			other.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
			entries = append(entries, other)
		}
	}
	subject := c.Images[0].Digest.String()
	if s.OnlyOthers {
		c.Images = nil
	}
	entries = append(entries, c.Images...)
	if s.Attestations {
		a, err := c.artifact("", types.config, `{"architecture":"unknown","os":"unknown","config":{},"rootfs":{"type":"layers","diff_ids":["`+digest.FromString(name).String()+`"]}}`,
			"application/vnd.in-toto+json", name)
		if err != nil {
			return nil, err
		}
		a.Platform = &ocispec.Platform{OS: "unknown", Architecture: "unknown"}
		a.Annotations = map[string]string{"vnd.docker.reference.type": "attestation-manifest", "vnd.docker.reference.digest": subject}
		entries = append(entries, a)
	}
	if s.Companion {
		a, err := c.artifact("application/vnd.example.signature.v1", ocispec.MediaTypeEmptyJSON, "{}", "application/vnd.example.signature.v1+json", `{"signature":"`+name+`"}`)
		if err != nil {
			return nil, err
		}
		// Only the manifest tells whether it is for this platform, if that does.
		need(a, c.addBlob(ocispec.MediaTypeEmptyJSON, []byte("{}")))
		entries = append(entries, a)
	}
	for range s.Indexes {
		c.Root, err = c.addManifest(types.index, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: types.index, Manifests: entries,
		})
		if err != nil {
			return nil, err
		}
		need(c.Root)
		entries = []ocispec.Descriptor{c.Root}
	}
	return c, nil
}

// other makes an image for another machine.
func (s Shape) other(c *Content, name, arch string) (ocispec.Descriptor, error) {
	data, diffID, err := dataLayer(name+" "+arch, 0, Gzip)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	config, err := Shape{Architecture: arch}.config(name, []digest.Digest{diffID})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return c.addImage(ocispec.MediaTypeImageManifest, "", nil, c.addBlob(ocispec.MediaTypeImageConfig, config),
		[]ocispec.Descriptor{c.addBlob(ocispec.MediaTypeImageLayerGzip, data)})
}

func (c *Content) artifact(artifactType, configType, config, layerType, data string) (ocispec.Descriptor, error) {
	d, err := c.addImage(ocispec.MediaTypeImageManifest, artifactType, nil, c.addBlob(configType, []byte(config)),
		[]ocispec.Descriptor{c.addBlob(layerType, []byte(data))})
	d.ArtifactType = artifactType
	return d, err
}

// layers adds the layers in an encoding.
func (s Shape) layers(c *Content, name string, enc Encoding) ([]ocispec.Descriptor, []digest.Digest, error) {
	var (
		descs []ocispec.Descriptor
		ids   []digest.Digest
	)
	add := func(data []byte, id digest.Digest) {
		d := c.addBlob(layerType(enc, s.Docker), data)
		d.Annotations = s.Annotations
		descs, ids = append(descs, d), append(ids, id)
	}
	if !s.NoLayers {
		data, id, err := lowest(enc)
		if err != nil {
			return nil, nil, err
		}
		add(data, id)
		for i := range s.More {
			if data, id, err = dataLayer(name, i, enc); err != nil {
				return nil, nil, err
			}
			add(data, id)
		}
		if s.SameTwice {
			add(data, id)
		}
		if s.LayerType != "" {
			descs[len(descs)-1].MediaType = s.LayerType
		}
	}
	for i, t := range s.Blobs {
		descs = append(descs, c.addBlob(t, fmt.Appendf(nil, "blob %d of %s, of the media type %s", i, name, t)))
	}
	return descs, ids, nil
}

// Platform is what the config claims.
func (s Shape) Platform() ocispec.Platform {
	return ocispec.Platform{
		OS: cmp.Or(s.OS, "linux"), Architecture: cmp.Or(s.Architecture, runtime.GOARCH),
		Variant: s.Variant, OSFeatures: s.OSFeatures,
	}
}

func (s Shape) config(name string, diffIDs []digest.Digest) ([]byte, error) {
	img := ocispec.Image{
		Platform: s.Platform(),
		Config: ocispec.ImageConfig{
			User: s.User,
			Env:  []string{"PATH=/bin"},
			Cmd:  []string{"/bin/sh", "-c", "trap 'exit 0' TERM; echo " + s.Greeting(name) + "$(id -u); tail -f /dev/null & wait"},
		},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: append([]digest.Digest{}, diffIDs...)},
	}
	if img.Config.User == "" {
		img.Config.User = "1000:1000"
	}
	img.Config.Labels = map[string]string{"name": name}
	data, err := json.Marshal(img)
	if missing := s.ConfigSize - len(data); err == nil && missing > 0 {
		img.Config.Labels["padding"] = strings.Repeat("x", missing)
		data, err = json.Marshal(img)
	}
	return data, err
}

var lowestLayers sync.Map // Encoding -> func() (encoded, error)

// lowest returns the layer that has the shell. It takes time to compress.
func lowest(enc Encoding) ([]byte, digest.Digest, error) {
	f, _ := lowestLayers.LoadOrStore(enc, sync.OnceValues(func() (encoded, error) {
		img, err := Build(Spec{Name: "shape", Encoding: enc})
		if err != nil {
			return encoded{}, err
		}
		layers, err := img.Layers()
		if err != nil {
			return encoded{}, err
		}
		return read(layers[0])
	}))
	l, err := f.(func() (encoded, error))()
	return l.data, l.diffID, err
}

// dataLayer returns a small layer.
func dataLayer(name string, i int, enc Encoding) ([]byte, digest.Digest, error) {
	random := rand.NewChaCha8(seed(fmt.Sprint(name, i)))
	data := make([]byte, 64)
	random.Read(data) // never fails
	l, err := layer([]file{dir("data"), {name: fmt.Sprintf("data/%03d", i), mode: 0o644, data: data}}, enc, random)
	if err != nil {
		return nil, "", err
	}
	e, err := read(l)
	return e.data, e.diffID, err
}

type encoded struct {
	data   []byte
	diffID digest.Digest
}

func read(l v1.Layer) (encoded, error) {
	rc, err := l.Compressed()
	if err != nil {
		return encoded{}, err
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	if err != nil {
		return encoded{}, err
	}
	id, err := l.DiffID()
	return encoded{data, digest.Digest(id.String())}, err
}
