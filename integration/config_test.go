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
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// A wrong value must not be taken for some other one: a mount type that Kata does
// not know, say, would start containers on an empty root file system. Containerd
// then has no CRI, and its log says which key it is and what the key takes.
func TestWrongConfigurationIsRefused(t *testing.T) {
	for config, says := range map[string]string{
		`mount_type = "overlay"`:              `mount_type = \"overlay\": want \"fuse.\"`,
		`mount_options = ["lowerdir=/"]`:      `mount_options has \"lowerdir=/\"`,
		`mount_options = ["a,b", "c d", "e"]`: `mount_options has \"c d\"`,
	} {
		t.Run(config, func(t *testing.T) {
			_, err := harness.Start(t.Context(), harness.Options{PluginConfig: config})
			require.ErrorContains(t, err, says)
		})
	}
}

// Where the store is and how its mounts look can be configured; a guest, in each
// flavour that takes such a mount, runs the same with it.
func TestConfiguration(t *testing.T) {
	bin, err := harness.Binaries()
	require.NoError(t, err)
	root := filepath.Join(t.TempDir(), "store")
	for name, c := range map[string]struct {
		config, mountType string
		flavour           guest.Flavour
	}{
		"store elsewhere": {`root_path = "` + root + `"` + "\nsync_remove = true", "fuse.nydus-overlayfs-guest-pull", guest.FlavourGo},
		"helper by path": {`mount_type = "fuse.` + bin + `/nydus-overlayfs-guest-pull"`,
			"fuse." + bin + "/nydus-overlayfs-guest-pull", guest.FlavourGo},
		"helper by our name": {`mount_type = "fuse.guest-pull-overlayfs"`, "fuse.guest-pull-overlayfs", guest.FlavourRust},
		"mount options":      {`mount_options = ["metacopy=off"]`, "fuse.nydus-overlayfs-guest-pull", guest.FlavourRust},
	} {
		t.Run(name, func(t *testing.T) {
			n, reg := newNode(t, harness.Options{PluginConfig: c.config, Guest: guest.Config{Flavour: c.flavour}})
			if name == "helper by our name" && !n.StandIn() {
				t.Skipf("an unpatched Go shim of Kata would mount %s on the host; see Compatibility in the README", c.mountType)
			}
			// Image volumes and users are looked at on the host: through the helper.
			img := push(t, reg, images.Spec{Name: "app", Layers: 2, Volumes: []string{"/volume"}})
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			container := run(t, pod, harness.ContainerSpec{Image: img.Ref})
			requireRuns(t, container, img)
			requireNotOnHost(t, n, img)
			mounts, err := n.Mounts(t.Context(), container.ID)
			require.NoError(t, err)
			require.Len(t, mounts, 1)
			require.Equal(t, c.mountType, mounts[0].Type)
			if name == "mount options" {
				require.Contains(t, mounts[0].Options, "metacopy=off")
			}
			if name == "store elsewhere" {
				require.FileExists(t, filepath.Join(root, "metadata.db"))
				require.NoFileExists(t, filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "metadata.db"))
				// Elsewhere is where the look for leftovers does not look.
				require.NoError(t, n.Empty(t.Context()))
				dirs, err := filepath.Glob(filepath.Join(root, "snapshots", "*"))
				require.NoError(t, err)
				require.Empty(t, dirs)
			}
		})
	}
}
