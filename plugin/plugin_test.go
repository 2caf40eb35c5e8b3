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

package plugin

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

func registration(t *testing.T) plugin.Registration {
	t.Helper()
	for _, r := range registry.Graph(func(*plugin.Registration) bool { return false }) {
		if r.URI() == "io.containerd.snapshotter.v1.guest-pull" {
			return r
		}
	}
	t.Fatal("not registered")
	return plugin.Registration{}
}

func initContext(t *testing.T, config any) *plugin.InitContext {
	ic := plugin.NewContext(t.Context(), plugin.NewPluginSet(), map[string]string{plugins.PropertyRootDir: t.TempDir()})
	ic.Config = config
	return ic
}

// What CRI and the transfer service read of the plugin: they decide by it where
// usage is measured, that layers are labelled, and how IDs are mapped.
func TestRegistration(t *testing.T) {
	r := registration(t)
	assert.Equal(t, &Config{MountType: snapshotter.DefaultMountType, ResolveUsers: "off", ResolveUsersConcurrency: 2}, r.Config)

	ic := initContext(t, r.Config)
	instance, err := r.InitFn(ic)
	require.NoError(t, err)
	s := instance.(snapshots.Snapshotter)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	assert.Implements(t, (*snapshots.Cleaner)(nil), s)
	assert.Implements(t, (*users.LayerObserver)(nil), s)

	root := ic.Properties[plugins.PropertyRootDir]
	assert.Equal(t, map[string]string{"root": root}, ic.Meta.Exports)
	assert.Equal(t, platforms.DefaultSpec(), ic.Meta.Platforms[0])
	assert.Contains(t, ic.Meta.Capabilities, "only-remap-ids")
	assert.Contains(t, ic.Meta.Capabilities, "remote-only")
	assert.FileExists(t, filepath.Join(root, "metadata.db"))
}

func TestRootPathAndUsers(t *testing.T) {
	root := filepath.Join(t.TempDir(), "elsewhere")
	ic := initContext(t, &Config{RootPath: root, ResolveUsers: "registry"})
	instance, err := initialize(ic)
	require.NoError(t, err)
	s := instance.(snapshots.Snapshotter)
	t.Cleanup(func() { require.NoError(t, s.Close()) })
	assert.Equal(t, root, ic.Meta.Exports["root"])
	assert.FileExists(t, filepath.Join(root, "metadata.db"))
	assert.Implements(t, (*snapshots.Cleaner)(nil), s, "the garbage collector looks for it")
	entries, err := os.ReadDir(ic.Properties[plugins.PropertyRootDir])
	require.NoError(t, err)
	assert.Empty(t, entries)
}

// A wrong value is no reason to skip the plugin: a node would run without it,
// unnoticed.
func TestWrongValues(t *testing.T) {
	_, err := initialize(initContext(t, &Config{MountType: "overlay", MountOptions: []string{"a b"}, ResolveUsers: "maybe"}))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.False(t, plugin.IsSkipPlugin(err))
	for _, want := range []string{`mount_type = "overlay"`, `mount_options has "a b"`, `resolve_users = "maybe"`} {
		assert.ErrorContains(t, err, want)
	}
	_, err = initialize(initContext(t, "no config"))
	require.Error(t, err)
}

func TestMissingHelpers(t *testing.T) {
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	problems := missingHelpers(snapshotter.DefaultMountType)
	require.Len(t, problems, 2)
	assert.Contains(t, problems[0], "install the package fuse3")
	assert.Contains(t, problems[1], "nydus-overlayfs-guest-pull")
	assert.Contains(t, problems[1], "make install")

	for _, name := range []string{"mount.fuse", "nydus-overlayfs-guest-pull"} {
		require.NoError(t, os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"), 0o755))
	}
	assert.Empty(t, missingHelpers(snapshotter.DefaultMountType))
	assert.Contains(t, missingHelpers("fuse./no/such/helper")[0], "at this path")
}
