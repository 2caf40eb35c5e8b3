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

package snapshotter

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/errdefs"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// DefaultMountType is accepted by Kata's Go shims from 3.9.0 on, unpatched, and
// by its Rust shims (kata-containers, src/runtime/virtcontainers/kata_agent.go,
// IsNydusRootFSType).
const DefaultMountType = "fuse.nydus-overlayfs-guest-pull"

// Config is what can be configured of the snapshotter. The zero value is the
// default.
type Config struct {
	// MountType is the type of the mount that containers of guest-pulled images
	// get: "fuse." and the name or the absolute path of the mount helper.
	// Kata's Go shims decide by it whether a mount is theirs.
	MountType string

	// MountOptions are passed to overlayfs, for both kinds of containers.
	MountOptions []string

	// SyncRemove removes a snapshot's directories in Remove, not in the next
	// garbage collection.
	SyncRemove bool

	// Users is what the host knows of the users of images.
	Users users.Config
}

// mountHelper is the name or the absolute path of a program.
var mountHelper = regexp.MustCompile(`^([A-Za-z0-9_+-][A-Za-z0-9._+-]*|(/[A-Za-z0-9._+-]+)+)$`)

// Validate reports all that is wrong with a configuration. Each error names the
// key, the value and what is accepted, and wraps errdefs.ErrInvalidArgument.
func (c Config) Validate() error {
	var errs []error
	refuse := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...))
	}

	if c.MountType != "" {
		helper, ok := strings.CutPrefix(c.MountType, "fuse.")
		if !ok || !mountHelper.MatchString(helper) || filepath.Clean(helper) != helper {
			refuse("mount_type = %q: want \"fuse.\" and the name or the absolute path of the mount helper, as in %q", c.MountType, DefaultMountType)
		}
	}
	for _, o := range c.MountOptions {
		key, _, _ := strings.Cut(o, "=")
		switch {
		case o == "" || strings.ContainsFunc(o, breaksOptions):
			refuse("mount_options has %q: want one option of overlayfs to an entry, without commas, spaces, quotes and line breaks", o)
		case slices.Contains([]string{"lowerdir", "lowerdir+", "datadir+", "upperdir", "workdir"}, key):
			refuse("mount_options has %q: the snapshotter sets the directories itself", o)
		case strings.HasPrefix(o, volume.OptionPrefix):
			refuse("mount_options has %s...: the snapshotter sets the volume itself", volume.OptionPrefix)
		}
	}
	return errors.Join(append(errs, c.Users.Validate())...)
}

func validateRoot(root string) error {
	if !filepath.IsAbs(root) {
		return fmt.Errorf("root_path = %q: an absolute path is needed: %w", root, errdefs.ErrInvalidArgument)
	}
	if i := strings.IndexFunc(root, breaksOptions); i >= 0 {
		return fmt.Errorf("root_path = %q: the character at offset %d cannot stand in mount options; use a path of letters, digits and -._/+@=~: %w",
			root, i, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (c Config) withDefaults() Config {
	if c.MountType == "" {
		c.MountType = DefaultMountType
	}
	return c
}

// overlayOptions are the options of the overlay in a guest mount. As the overlay
// snapshotter does, it turns off the index where the kernel has it: with it, a
// directory cannot be the upperdir of two mounts.
func (c Config) overlayOptions() []string {
	options := slices.Clone(c.MountOptions)
	hasIndex := slices.ContainsFunc(options, func(o string) bool {
		key, _, _ := strings.Cut(o, "=")
		return key == "index"
	})
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil && !hasIndex {
		options = append(options, "index=off")
	}
	return options
}

// breaksOptions tells the characters that have a meaning to overlayfs, to a list
// of mount options, or to the shell through which mount.fuse runs the mount
// helper.
func breaksOptions(r rune) bool {
	return unicode.IsSpace(r) || unicode.IsControl(r) || strings.ContainsRune(`,:;\"'$&|<>()*?[]{}!#`+"`", r)
}

// SupportsRemapIDs tells whether the kernel can map the IDs of an overlayfs's
// lower directories, which pods with user namespaces need.
func SupportsRemapIDs() bool {
	ok, err := overlayutils.SupportsIDMappedMounts()
	return err == nil && ok
}
