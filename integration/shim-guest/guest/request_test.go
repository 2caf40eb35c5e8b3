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
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

const helper = "fuse.nydus-overlayfs-guest-pull"

func option(json string) string {
	return volumeOption + base64.StdEncoding.EncodeToString([]byte(json))
}

const goodJSON = `{"volume_type":"image_guest_pull","source":"dummy","fs_type":"overlay","image_pull":{"metadata":{"k":"v"}}}`

func guestMount(fsType string, options ...string) mount.Mount {
	return mount.Mount{
		Type:    fsType,
		Source:  "overlay",
		Options: append([]string{"workdir=/w", "upperdir=/u", "lowerdir=/l"}, options...),
	}
}

// A test against the stand-in only says something about Kata when it refuses
// what Kata refuses, and what Kata accepts in silence and runs wrongly.
func TestCheckRootfs(t *testing.T) {
	good := guestMount(helper, option(goodJSON))
	for _, tc := range []struct {
		name    string
		flavour Flavour
		rootfs  []mount.Mount
		err     string // empty: accepted
	}{
		{name: "a name", rootfs: []mount.Mount{good}},
		{name: "a path", rootfs: []mount.Mount{guestMount("fuse./usr/local/bin/nydus-overlayfs-guest-pull", option(goodJSON))}},
		{name: "the name of nydus", rootfs: []mount.Mount{guestMount("fuse.nydus-overlayfs", option(goodJSON))}},
		{name: "unknown fields", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull","x":1,"image_pull":{"metadata":{},"y":2}}`))}},

		{name: "a name that Kata mounts", rootfs: []mount.Mount{guestMount("fuse.guest-pull-overlayfs", option(goodJSON))}, err: "mount type"},
		{name: "fuse3", rootfs: []mount.Mount{guestMount("fuse3.nydus-overlayfs", option(goodJSON))}, err: "mount type"},
		{name: "the name in the directory only", rootfs: []mount.Mount{guestMount("fuse./nydus-overlayfs/helper", option(goodJSON))}, err: "mount type"},
		{name: "overlay", rootfs: []mount.Mount{guestMount("overlay", option(goodJSON))}, err: "mount type"},
		{name: "overlay, Rust", flavour: FlavourRust, rootfs: []mount.Mount{guestMount("overlay", option(goodJSON))}},

		{name: "no mount", err: "want one mount"},
		{name: "two mounts", rootfs: []mount.Mount{good, good}, err: "want one mount"},
		{name: "two mounts, Rust", flavour: FlavourRust, rootfs: []mount.Mount{good, good}, err: "want one mount"},
		{name: "no volume", rootfs: []mount.Mount{guestMount(helper)}, err: "want one mount option"},
		{name: "two volumes", rootfs: []mount.Mount{guestMount(helper, option(goodJSON), option(goodJSON))}, err: "want one mount option"},
		{name: "empty volume", rootfs: []mount.Mount{guestMount(helper, volumeOption)}, err: "JSON"},
		{name: "not base64", rootfs: []mount.Mount{guestMount(helper, volumeOption+"{}")}, err: "base64"},
		{name: "base64 without padding", rootfs: []mount.Mount{guestMount(helper, volumeOption+"e30")}, err: "base64"},
		{name: "not JSON", rootfs: []mount.Mount{guestMount(helper, option("volume"))}, err: "JSON"},
		{name: "another volume", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"direct_block","image_pull":{"metadata":{}}}`))}, err: "volume_type"},
		{name: "no image_pull", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull"}`))}, err: "image_pull is missing"},
		{name: "image_pull without metadata", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull","image_pull":{}}`))}, err: "metadata"},
		{name: "metadata null", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull","image_pull":{"metadata":null}}`))}, err: "metadata"},
		{name: "metadata of numbers", rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull","image_pull":{"metadata":{"a":1}}}`))}, err: "JSON"},
		{name: "no source, Rust", flavour: FlavourRust, rootfs: []mount.Mount{guestMount(helper, option(`{"volume_type":"image_guest_pull","source":"","image_pull":{"metadata":{}}}`))}, err: "source"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if tc.flavour == "" {
				tc.flavour = FlavourGo
			}
			v, err := checkRootfs(tc.flavour, tc.rootfs)
			if tc.err == "" {
				require.NoError(t, err)
				assert.NotNil(t, v.ImagePull.Metadata)
				return
			}
			require.ErrorContains(t, err, tc.err)
			assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		})
	}
}

// The encoder of the snapshotter and the decoder here share no code, and have to
// agree, as the encoder and Kata have to.
func TestReadsWhatTheSnapshotterWrites(t *testing.T) {
	metadata := map[string]string{volume.MetadataChainID: "sha256:abc", "containerd.io/snapshot/x": "a,b=\"ä\n"}
	o, err := volume.GuestPull("dummy", metadata).Option()
	require.NoError(t, err)
	for _, flavour := range []Flavour{FlavourGo, FlavourRust} {
		v, err := checkRootfs(flavour, []mount.Mount{guestMount(helper, o)})
		require.NoError(t, err)
		assert.Equal(t, Volume{
			VolumeType: "image_guest_pull",
			Source:     "dummy",
			FSType:     "overlay",
			ImagePull:  &ImagePull{Metadata: metadata},
		}, v)
	}

	o, err = volume.GuestPull("dummy", nil).Option()
	require.NoError(t, err)
	_, err = checkRootfs(FlavourGo, []mount.Mount{guestMount(helper, o)})
	require.NoError(t, err, "no metadata has to be an empty object")
}

func TestImageName(t *testing.T) {
	for _, tc := range []struct {
		name        string
		annotations map[string]string
		want        string // empty: refused
	}{
		{name: "ctr", annotations: map[string]string{annotationImageName: "a/b:1"}, want: "a/b:1"},
		{name: "container", annotations: map[string]string{annotationContainerType: "container", annotationImageName: "a/b:1"}, want: "a/b:1"},
		{name: "sandbox", annotations: map[string]string{annotationContainerType: "sandbox"}, want: PauseImage},
		// Whatever the host says: the guest has its own pause.
		{name: "sandbox with a name", annotations: map[string]string{annotationContainerType: "sandbox", annotationImageName: "a/b:1"}, want: PauseImage},
		{name: "nothing"},
		{name: "container without a name", annotations: map[string]string{annotationContainerType: "container"}},
		{name: "empty name", annotations: map[string]string{annotationContainerType: "container", annotationImageName: ""}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := imageName(tc.annotations)
			assert.Equal(t, tc.want, got)
			if tc.want == "" {
				assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
				assert.ErrorContains(t, err, "annotation", "the error has to say what to do")
			} else {
				assert.NoError(t, err)
			}
		})
	}
}

// Kata writes the OCI annotations over the volume's metadata.
func TestAnnotationsWinOverMetadata(t *testing.T) {
	v := Volume{ImagePull: &ImagePull{Metadata: map[string]string{"k": "host", "other": "o"}}}
	assert.Equal(t, "annotation", mergedMetadata(v, map[string]string{"k": "annotation"}, "k"))
	assert.Equal(t, "o", mergedMetadata(v, map[string]string{"k": "annotation"}, "other"))
}
