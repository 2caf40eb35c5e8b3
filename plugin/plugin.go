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
	"errors"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/plugins"
	"github.com/containerd/log"
	"github.com/containerd/platforms"
	"github.com/containerd/plugin"
	"github.com/containerd/plugin/registry"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/metrics"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// ID is the name under which a runtime handler chooses the snapshotter.
const ID = "guest-pull"

// Config is the section [plugins.'io.containerd.snapshotter.v1.guest-pull'] of
// containerd's configuration.
type Config struct {
	// RootPath is the directory of the snapshotter, the plugin's own below
	// containerd's root when empty.
	RootPath string `toml:"root_path"`

	// MountType is the type of the mount by which a container of a guest-pulled
	// image starts: "fuse." and the name or the absolute path of the mount
	// helper.
	MountType string `toml:"mount_type"`

	// SyncRemove removes directories together with their snapshot instead of in
	// the next garbage collection.
	SyncRemove bool `toml:"sync_remove"`

	// MountOptions are options for overlayfs.
	MountOptions []string `toml:"mount_options"`

	// Users are users that images name, with "uid" or "uid:gid", and Groups
	// their groups. They are for all images whose own users are not known.
	Users  map[string]string      `toml:"users"`
	Groups map[string]users.Group `toml:"groups"`

	// ResolveUsers is "off", or "registry" to read the users and groups of an
	// image out of its layers when it is pulled. This streams layers through
	// the host's memory.
	ResolveUsers string `toml:"resolve_users"`

	// ResolveUsersConcurrency is how many images are read at once for that.
	ResolveUsersConcurrency int `toml:"resolve_users_concurrency"`
}

func init() {
	registry.Register(&plugin.Registration{
		Type:   plugins.SnapshotPlugin,
		ID:     ID,
		Config: &Config{MountType: snapshotter.DefaultMountType, ResolveUsers: users.ResolveOff, ResolveUsersConcurrency: users.DefaultConcurrency},
		InitFn: initialize,
	})
}

func initialize(ic *plugin.InitContext) (any, error) {
	config, ok := ic.Config.(*Config)
	if !ok {
		return nil, errors.New("invalid guest-pull configuration")
	}
	mountType := config.MountType
	if mountType == "" {
		mountType = snapshotter.DefaultMountType
	}
	root := config.RootPath
	if root == "" {
		root = ic.Properties[plugins.PropertyRootDir]
	}

	ic.Meta.Platforms = append(ic.Meta.Platforms, platforms.DefaultSpec())
	ic.Meta.Exports[plugins.SnapshotterRootDir] = root
	// As the overlay snapshotter: IDs are mapped by mounts, never by chown.
	ic.Meta.Capabilities = append(ic.Meta.Capabilities, "only-remap-ids")
	if snapshotter.SupportsRemapIDs() {
		ic.Meta.Capabilities = append(ic.Meta.Capabilities, "remap-ids")
	}

	// No image content gets to the host, and a layer is answered for from its name
	// (core/snapshots/snapshotter.go after patches/containerd, RemoteOnlyCap).
	// containerd's pulls and CRI ask for nothing else to know it.
	ic.Meta.Capabilities = append(ic.Meta.Capabilities, "remote-only")

	m := metrics.New()
	s, err := snapshotter.New(ic.Context, root, snapshotter.Config{
		MountType:    mountType,
		MountOptions: config.MountOptions,
		SyncRemove:   config.SyncRemove,
		Users: users.Config{
			Users:       config.Users,
			Groups:      config.Groups,
			Resolve:     config.ResolveUsers,
			Concurrency: config.ResolveUsersConcurrency,
			Observe:     func(result string) { m.UserLookup(users.ResolveRegistry, result) },
		},
	})
	if err != nil {
		return nil, err
	}
	logger := log.G(ic.Context).WithFields(log.Fields{
		"root":          root,
		"mount_type":    mountType,
		"sync_remove":   config.SyncRemove,
		"mount_options": config.MountOptions,
		"resolve_users": config.ResolveUsers,
		"users":         len(config.Users),
		"groups":        len(config.Groups),
	})
	logger.Info("guest-pull snapshotter: images are left to the guest to pull")
	for _, problem := range missingHelpers(mountType) {
		logger.Warn(problem)
	}

	wrapped := m.Wrap(s)
	if err := m.Register(); err != nil {
		logger.WithError(err).Warn("the guest-pull snapshotter has no metrics")
	}
	return wrapped, nil
}

// missingHelpers says which programs are not found that containerd runs when it
// mounts a container's root filesystem on the host (core/mount/mount_linux.go,
// mountWithHelper). Pods start without them as long as it has no need to, so
// they are no error.
func missingHelpers(mountType string) (problems []string) {
	// For a type "fuse.X" containerd runs mount.fuse, and never mount.fuse3.
	if _, err := exec.LookPath("mount.fuse"); err != nil {
		problems = append(problems, "mount.fuse is not in containerd's PATH: install the package fuse3 (where that has mount.fuse3 only, link mount.fuse to it)")
	}
	helper := strings.TrimPrefix(mountType, "fuse.")
	if _, err := exec.LookPath(helper); err != nil {
		remedy := "install guest-pull-overlayfs under this name (make install)"
		if filepath.IsAbs(helper) {
			remedy = "install guest-pull-overlayfs at this path"
		}
		problems = append(problems, "the mount helper "+helper+" is not in containerd's PATH: "+remedy)
	}
	return problems
}
