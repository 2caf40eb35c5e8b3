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

package integration_test

import (
	"encoding/json"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

// shapeCase is an image, the pods that use it one after the other, and the node
// that they are on. It is written as JSON.
type shapeCase struct {
	Node  shapeNode
	Image images.Shape
	// Before is how the image comes to the node before the first pod: "" (not
	// at all), "import", "pull" (over CRI, for no pod), "ctr" (for the guest).
	Before string `json:",omitempty"`
	Pods   []shapePod
}

type shapeNode struct {
	LocalPull         bool `json:",omitempty"`
	Discard           bool `json:",omitempty"`
	DisableLayerFetch bool `json:",omitempty"`
	// RuncFirst has a pod of the handler runc before all others, so that the
	// pause image comes for it.
	RuncFirst bool         `json:",omitempty"`
	Pause     images.Shape `json:",omitzero"`
}

type shapePod struct {
	// Runc is a pod on the host instead of one in a guest.
	Runc   bool               `json:",omitempty"`
	Policy harness.PullPolicy `json:",omitempty"`
	// Volume mounts the image into a container of another one.
	Volume bool `json:",omitempty"`
	// KubeletRestarted: the pod's annotations are no longer its sandbox's.
	KubeletRestarted bool `json:",omitempty"`
	// Restart kills containerd before this pod, Remove removes the image.
	Restart bool `json:",omitempty"`
	Remove  bool `json:",omitempty"`
}

func (c shapeCase) String() string {
	b, err := json.Marshal(c)
	if err != nil {
		return err.Error()
	}
	return string(b)
}

// maker makes things up, some of them more often than others.
type maker struct{ *rand.Rand }

func (m maker) oneIn(n int) bool { return m.IntN(n) == 0 }

func pick[T any](m maker, from ...T) T { return from[m.IntN(len(from))] }

// Whatever may be in a manifest's list of layers and is no layer for containerd.
var noLayerTypes = []string{
	"application/octet-stream",
	"application/vnd.example.unknown.v1+tar",
	"application/vnd.in-toto+json",
	"application/vnd.oci.image.layer.v1.tar+lz4",
	"application/vnd.docker.image.rootfs.diff.tar.xz",
	"application/vnd.oci.image.config.v1+json",
	"text/plain",
	ocispec.MediaTypeImageManifest,
	"application/vnd.docker.distribution.manifest.list.v2+json",
}

var foreignTypes = []string{
	"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
	"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
}

// annotations that mean something to containerd where they are labels, or look so.
var annotations = []map[string]string{
	{"containerd.io/snapshot.ref": "sha256:" + strings.Repeat("0", 64)},
	{"containerd.io/snapshot/cri.image-ref": "elsewhere/image:1", "containerd.io/snapshot/cri.layer-digest": "none"},
	{"containerd.io/snapshot/uidmapping": "0:100000:65536", "containerd.io/snapshot/gidmapping": "0:100000:65536"},
	{"containerd.io/snapshot/nydus-proxy-mode": "true", "containerd.io/snapshot/remote/stargz.reference": "x"},
	{"containerd.io/gc.root": "now", "containerd.io/gc.expire": "2000-01-01T00:00:00Z", "containerd.io/gc.ref.content.0": "sha256:" + strings.Repeat("1", 64)},
	{"containerd.io/uncompressed": "sha256:" + strings.Repeat("2", 64), "containerd.io/distribution.source.localhost": "other"},
	{"org.opencontainers.image.title": strings.Repeat("a long title ", 400), "": "empty", "ключ": "значение\n"},
}

func (m maker) image() (s images.Shape) {
	s.More = pick(m, 0, 0, 1, 1, 2, 3, 5)
	if m.oneIn(15) {
		s.More = 20 + m.IntN(60)
	} else if m.oneIn(40) {
		s.More = pick(m, 126, 127, 128, 300, 498, 499, 500, 600)
	}
	s.Encoding = pick(m, "", "", images.Zstd, images.Uncompressed)
	if s.More > 100 {
		s.Encoding = images.Uncompressed // takes less time to make
	}
	s.Docker = m.oneIn(4)
	s.SameTwice = m.oneIn(8)
	s.NoLayers = m.oneIn(30)
	switch m.IntN(8) {
	case 0:
		s.LayerType = pick(m, noLayerTypes...)
	case 1:
		s.LayerType = pick(m, foreignTypes...)
	case 2:
		for range 1 + m.IntN(2) {
			s.Blobs = append(s.Blobs, pick(m, noLayerTypes...))
		}
	}
	if m.oneIn(12) {
		s.ConfigType = pick(m, "application/octet-stream", "application/vnd.example.config.v1+json", "application/vnd.cncf.helm.config.v1+json",
			"application/vnd.docker.container.image.v1+json", "application/vnd.oci.image.config.v1+json")
	}
	if m.oneIn(20) {
		s.ArtifactType = pick(m, "application/vnd.example.model.v1", "application/vnd.oci.image.config.v1+json")
	}
	if m.oneIn(5) {
		s.OS = pick(m, "", "", "windows", "freebsd", "darwin", "plan9")
		s.Architecture = pick(m, "", "arm64", "arm", "riscv64", "wasm", "x86_64", "unknown")
		s.Variant = pick(m, "", "", "v2", "v8")
	}
	if m.oneIn(8) {
		s.OSFeatures = pick(m, []string{"win32k"}, []string{"a", "b"})
	}
	if m.oneIn(4) {
		s.Annotations = maps.Clone(pick(m, annotations...))
	}
	if m.oneIn(20) {
		s.ConfigSize = 200 << 10
	}
	if !m.oneIn(3) {
		return s
	}
	s.Indexes = pick(m, 1, 1, 1, 1, 2, 3)
	if m.oneIn(3) {
		s.Twin = pick(m, images.Gzip, images.Zstd, images.Uncompressed)
		s.TwinFirst = m.oneIn(2)
	}
	s.OtherPlatforms = m.oneIn(3)
	s.OnlyOthers = m.oneIn(20)
	s.Attestations = m.oneIn(3)
	s.Companion = m.oneIn(5)
	s.NoPlatform = m.oneIn(8)
	return s
}

func (m maker) pods(s images.Shape) (pods []shapePod) {
	for range pick(m, 1, 1, 2, 2, 3, 4) {
		p := shapePod{
			// Hundreds of layers take the host a while.
			Runc:             m.oneIn(3) && s.More < 100,
			Policy:           pick(m, "", "", "", harness.Always, harness.Never),
			Volume:           m.oneIn(10),
			KubeletRestarted: m.oneIn(8),
		}
		if len(pods) > 0 {
			p.Restart, p.Remove = m.oneIn(25), m.oneIn(12)
		}
		pods = append(pods, p)
	}
	return pods
}

// pause makes a pause image up. Not one that no pod can start with.
func (m maker) pause() images.Shape {
	if m.oneIn(2) {
		return images.Shape{}
	}
	s := m.image()
	s.Blobs, s.NoLayers, s.OnlyOthers, s.ArtifactType, s.ConfigType = nil, false, false, "", ""
	s.More = min(s.More, 10)
	if refusal(s) != nil {
		return images.Shape{}
	}
	return s
}

func (m maker) cases(node shapeNode, n int) (cases []shapeCase) {
	for range n {
		c := shapeCase{Node: node, Image: m.image()}
		c.Pods = m.pods(c.Image)
		if m.oneIn(5) {
			c.Before = pick(m, "import", "pull", "ctr")
		}
		cases = append(cases, c)
	}
	return cases
}

// The errors of images that nothing can be done about.
const (
	noMatch    = "no match for platform"
	noImage    = "this is no container image"       // when it is pulled, or unpacked
	noLayers   = "has no layers, or is an artifact" // when a container is created
	noConfig   = "bytes, more than the"
	noMatching = "number of layers and diffIDs don't match"
	noVolume   = "image volume"
	notPresent = "not present with pull policy Never"
)

// isConfigType reports whether a manifest with such a config is an image's.
func isConfigType(t string) bool {
	return strings.HasSuffix(t, "docker.container.image.v1+json") || strings.HasSuffix(t, "oci.image.config.v1+json") ||
		t == "application/octet-stream" // of registries that lost it
}

func isManifestType(t string) bool {
	return t == ocispec.MediaTypeImageManifest || t == "application/vnd.docker.distribution.manifest.list.v2+json"
}

// refusal returns the errors one of which says why no guest can run the image; none for
// one that it can run. Of several reasons any will do: who looks first depends on who had
// the image before.
func refusal(s images.Shape) (why []string) {
	layers := s.More + 1
	if s.SameTwice {
		layers++
	}
	if s.Indexes > 0 && s.OnlyOthers {
		why = append(why, noMatch, noImage) // the artifact without a platform is for all of them
	}
	if s.ConfigSize > 8<<20 {
		why = append(why, noConfig)
	}
	if s.ArtifactType != "" || s.NoLayers {
		why = append(why, noImage, noLayers, noMatching)
	}
	if layers+len(s.Blobs) > 500 || s.ConfigType != "" && !isConfigType(s.ConfigType) || slices.ContainsFunc(append(s.Blobs, s.LayerType), isManifestType) {
		why = append(why, noImage)
	}
	if len(s.Blobs) > 0 {
		why = append(why, noImage, noMatching, "layers and the configuration", noMatch) // the third one by the guest
	}
	if s.Indexes > 0 && s.NoPlatform && !platforms.Default().Match(s.Platform()) {
		why = append(why, noMatch) // nothing but the config tells what it is for
	}
	return why
}
