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
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
)

const (
	volumeOption = "io.katacontainers.volume="

	annotationContainerType = "io.kubernetes.cri.container-type"
	annotationImageName     = "io.kubernetes.cri.image-name"
	annotationSandboxID     = "io.kubernetes.cri.sandbox-id"

	containerTypeSandbox = "sandbox"
)

// PauseImage is the name of the image that a sandbox runs. It is not pulled.
const PauseImage = "pause"

// Volume is the virtual volume of Kata, as far as it concerns guest pull.
type Volume struct {
	VolumeType string     `json:"volume_type"`
	Source     string     `json:"source"`
	FSType     string     `json:"fs_type"`
	ImagePull  *ImagePull `json:"image_pull"`
}

// ImagePull is the part of a Volume that is about the image.
type ImagePull struct {
	Metadata map[string]string `json:"metadata"`
}

// checkRootfs returns the volume of a container's root file system, or why the
// shim of that flavour would refuse or mishandle it (errdefs.ErrInvalidArgument).
func checkRootfs(flavour Flavour, rootfs []mount.Mount) (Volume, error) {
	if len(rootfs) != 1 {
		return Volume{}, fmt.Errorf("%w: want one mount for the root file system, got %d: is the snapshotter the guest-pull one?",
			errdefs.ErrInvalidArgument, len(rootfs))
	}
	m := rootfs[0]
	if flavour == FlavourGo && !leftToGuest(m.Type) {
		return Volume{}, fmt.Errorf(
			"%w: Kata's Go shim would mount type %q on the host and start the container on an empty root: the type has to be \"fuse.\" and a name or path whose last element begins with \"nydus-overlayfs\"",
			errdefs.ErrInvalidArgument, m.Type)
	}
	var options []string
	for _, o := range m.Options {
		if v, ok := strings.CutPrefix(o, volumeOption); ok {
			options = append(options, v)
		}
	}
	if len(options) != 1 {
		return Volume{}, fmt.Errorf("%w: want one mount option %s…, got %d: is the snapshotter the guest-pull one?",
			errdefs.ErrInvalidArgument, volumeOption, len(options))
	}
	v, err := parseVolume(flavour, options[0])
	if err != nil {
		return Volume{}, fmt.Errorf("%w: mount option %s: %w", errdefs.ErrInvalidArgument, volumeOption, err)
	}
	return v, nil
}

// leftToGuest reports whether Kata's Go shim, from 3.9.0 on, does not mount a
// root file system of the type on the host. "fuse3." is no such prefix.
func leftToGuest(fsType string) bool {
	name, ok := strings.CutPrefix(fsType, "fuse.")
	return ok && strings.HasPrefix(filepath.Base(name), "nydus-overlayfs")
}

func parseVolume(flavour Flavour, encoded string) (Volume, error) {
	b, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil {
		return Volume{}, fmt.Errorf("not standard base64: %w", err)
	}
	var v Volume
	if err := json.Unmarshal(b, &v); err != nil {
		return Volume{}, fmt.Errorf("not the JSON of a volume: %w", err)
	}
	switch {
	case v.VolumeType != "image_guest_pull":
		return Volume{}, fmt.Errorf("volume_type is %q, want \"image_guest_pull\"", v.VolumeType)
	// The Go shim writes into the metadata, so it has to be there; the Rust shim
	// does without, but takes no null.
	case v.ImagePull == nil:
		return Volume{}, fmt.Errorf("image_pull is missing")
	case v.ImagePull.Metadata == nil:
		return Volume{}, fmt.Errorf("image_pull.metadata is missing or null")
	case flavour == FlavourRust && v.Source == "":
		// Older releases of that shim do.
		return Volume{}, fmt.Errorf("source is empty")
	}
	return v, nil
}

// imageName returns the image that a container is to run by its annotations:
// PauseImage for a sandbox. Without a name the error is
// errdefs.ErrInvalidArgument. Before Kata 4.0 the Rust shim also wanted the
// container's type.
func imageName(annotations map[string]string) (string, error) {
	if annotations[annotationContainerType] == containerTypeSandbox {
		return PauseImage, nil
	}
	name := annotations[annotationImageName]
	if name == "" {
		return "", fmt.Errorf("%w: no image to pull: the annotation %s is missing (add --annotation %s=IMAGE to ctr or nerdctl)",
			errdefs.ErrInvalidArgument, annotationImageName, annotationImageName)
	}
	return name, nil
}

// mergedMetadata is what the guest gets to see: OCI annotations win over equal
// keys of the volume.
func mergedMetadata(v Volume, annotations map[string]string, key string) string {
	if s, ok := annotations[key]; ok {
		return s
	}
	return v.ImagePull.Metadata[key]
}
