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

// Package volume encodes and decodes the mount option by which a snapshotter
// tells a Kata Containers runtime that the image of a container is to be
// pulled inside the guest:
//
//	io.katacontainers.volume=<base64(standard, padded) of a JSON object>
//
// The JSON is Kata's KataVirtualVolume. Its readers are the Go shim
// (kata-containers, src/runtime/pkg/direct-volume/utils.go and
// src/runtime/virtcontainers/kata_agent.go) and the Rust shim and the guest's
// agent (src/libs/kata-types/src/mount.rs). The package has no dependency
// outside the standard library, so that anything that meets such a mount can
// use it.
package volume

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
)

const (
	// OptionPrefix begins the mount option.
	OptionPrefix = "io.katacontainers.volume="

	// TypeImageGuestPull is the volume type of an image that the guest pulls.
	TypeImageGuestPull = "image_guest_pull"

	// MetadataChainID is the metadata key that holds the chain ID of the image
	// as the host resolved it (the identity of its unpacked layers, see
	// image-spec config.md, "Layer ChainID"). A guest can compare it with the
	// chain ID of what it unpacked.
	MetadataChainID = "containerd.io/snapshot/guest-pull.chain-id"

	// MetadataManifestDigest is the metadata key that holds the digest of the
	// image's manifest: of the one that the host chose, where the image's name is
	// that of an index. A guest can compare it with the manifest that it gets for
	// the name, before it fetches any layer. It is there for containers of CRI,
	// with a containerd that has the patch for it (containerd, pkg/snapshotters,
	// TargetManifestDigestLabel), unless the manifest is not as a registry has it:
	// the image was imported, or containerd mended a manifest that says
	// application/octet-stream of its config (core/remotes/docker, ConvertManifest).
	MetadataManifestDigest = "containerd.io/snapshot/cri.manifest-digest"

	// MetadataLayersSize is the metadata key that holds the sum of the sizes of
	// that manifest's layers, in bytes, as a decimal number: what the guest will
	// fetch, compressed in most images, and so the least that it needs space for.
	// It is there for containers of CRI, with that patch.
	MetadataLayersSize = "containerd.io/snapshot/cri.layers-size"
)

// ErrInvalid is wrapped by every error of this package.
var ErrInvalid = errors.New("invalid io.katacontainers.volume option")

// Volume is the part of Kata's KataVirtualVolume that guest pull uses.
type Volume struct {
	// VolumeType is TypeImageGuestPull.
	VolumeType string `json:"volume_type"`

	// Source is informational: the image to pull comes from the container's
	// annotations. Some Rust shims refuse an empty one.
	Source string `json:"source"`

	// FSType is informational. "overlay" is what every known shim accepts.
	FSType string `json:"fs_type"`

	// ImagePull has to be there: the Go shim dereferences it unchecked.
	ImagePull *ImagePull `json:"image_pull"`
}

// ImagePull carries what the host knows of the image.
type ImagePull struct {
	// Metadata is handed to the guest beside the container's OCI annotations,
	// which win over equal keys. It encodes as an object even when empty: the
	// Go shim writes into it.
	//
	// It is logged on its way, so it must never hold a secret.
	Metadata map[string]string `json:"metadata"`
}

// GuestPull returns the volume of an image that the guest pulls.
func GuestPull(source string, metadata map[string]string) Volume {
	if metadata == nil {
		metadata = map[string]string{}
	}
	return Volume{
		VolumeType: TypeImageGuestPull,
		Source:     source,
		FSType:     "overlay",
		ImagePull:  &ImagePull{Metadata: metadata},
	}
}

// Option encodes v as a mount option. Equal volumes have equal options: the
// keys of the metadata are sorted. The result holds no comma, so that it can
// stand in a list of mount options. A volume that Kata would refuse gives an
// error that wraps ErrInvalid.
func (v Volume) Option() (string, error) {
	if err := v.validate(); err != nil {
		return "", fmt.Errorf("encode: %w", err)
	}
	b, err := json.Marshal(v)
	if err != nil {
		return "", fmt.Errorf("encode: %w: %w", ErrInvalid, err)
	}
	return OptionPrefix + base64.StdEncoding.EncodeToString(b), nil
}

// ParseOption decodes a mount option that Option made. JSON fields that it does
// not know are ignored, as Kata does. Everything else that Kata would not read
// gives an error that wraps ErrInvalid; the error never repeats the option's
// content.
func ParseOption(option string) (Volume, error) {
	encoded, ok := strings.CutPrefix(option, OptionPrefix)
	if !ok {
		return Volume{}, fmt.Errorf("decode: %w: it does not begin with %q", ErrInvalid, OptionPrefix)
	}
	// base64 skips line breaks, which cannot stand in a mount option.
	if strings.ContainsAny(encoded, "\r\n") {
		return Volume{}, fmt.Errorf("decode: %w: line break in base64", ErrInvalid)
	}
	b, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return Volume{}, fmt.Errorf("decode: %w: not standard, padded base64: %w", ErrInvalid, err)
	}
	var v Volume
	if err := json.Unmarshal(b, &v); err != nil {
		return Volume{}, fmt.Errorf("decode: %w: not the JSON of a volume: %w", ErrInvalid, err)
	}
	if err := v.validate(); err != nil {
		return Volume{}, fmt.Errorf("decode: %w", err)
	}
	return v, nil
}

func (v Volume) validate() error {
	switch {
	case v.VolumeType != TypeImageGuestPull:
		return fmt.Errorf("%w: volume_type is %q, want %q", ErrInvalid, v.VolumeType, TypeImageGuestPull)
	case v.Source == "":
		return fmt.Errorf("%w: source is empty", ErrInvalid)
	case v.ImagePull == nil:
		return fmt.Errorf("%w: image_pull is missing", ErrInvalid)
	case v.ImagePull.Metadata == nil:
		return fmt.Errorf("%w: image_pull.metadata is missing", ErrInvalid)
	}
	return nil
}
