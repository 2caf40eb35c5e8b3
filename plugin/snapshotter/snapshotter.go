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

// Package snapshotter is a containerd snapshotter for images that are pulled
// inside a guest. No image content gets to the host through it:
//
//   - An image layer is a name, its chain ID. It has no row in the store, no
//     directory and costs no write (layer.go).
//   - A container's snapshot is one of containerd's own overlay snapshotter,
//     which is embedded. When its ancestry ends in such a layer, its mount
//     tells the Kata runtime to pull the image in the guest (mount.go).
//   - Whatever would extract image content on the host is refused (layer.go).
//
// Everything else behaves as the overlay snapshotter does. A database that is
// damaged is left alone, and what to do is said (database.go). Which users an image
// has is for the package users to know.
package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// snapshotter overrides of the embedded overlay snapshotter what differs for
// layers and for containers of guest-pulled images.
type snapshotter struct {
	snapshots.Snapshotter
	users.LayerObserver
	users *users.Images // of the images that containers are made of

	ms              *storage.MetaStore
	root, mountType string
	options         []string
}

// Snapshotter is what New returns. containerd's garbage collector and, with patches,
// its pulls ask whether it is more than a snapshots.Snapshotter.
type Snapshotter interface {
	snapshots.Snapshotter
	snapshots.Cleaner
	users.LayerObserver
}

// New returns a snapshotter that keeps the snapshots of containers under root,
// an absolute path, in the layout of the overlay snapshotter. A root that the
// older guest-pull daemon left can be used.
//
// Errors of the configuration wrap errdefs.ErrInvalidArgument; all of them are
// reported at once. It fails as well when root cannot be written, is on a file
// system without d_type, or holds a database that cannot be read or that another
// process has open; nothing is changed then.
func New(ctx context.Context, root string, config Config) (Snapshotter, error) {
	config = config.withDefaults()
	if err := errors.Join(validateRoot(root), config.Validate()); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("create the snapshotter's root: %w", err)
	}

	ms, err := newMetaStore(root)
	if err != nil {
		return nil, err
	}
	opts := []overlay.Opt{overlay.WithMetaStore(ms), overlay.WithMountOptions(config.MountOptions)}
	if !config.SyncRemove {
		opts = append(opts, overlay.AsynchronousRemove)
	}
	if SupportsRemapIDs() {
		opts = append(opts, overlay.WithRemapIDs)
	}
	embedded, err := overlay.NewSnapshotter(root, opts...)
	if err != nil {
		return nil, fmt.Errorf("set up the snapshotter's root %s: %w", root, err)
	}
	images, err := users.New(ctx, root, config.Users)
	if err != nil {
		return nil, errors.Join(err, ms.Close())
	}
	s := &snapshotter{
		Snapshotter:   embedded,
		LayerObserver: images,
		users:         images,
		ms:            ms,
		root:          root,
		mountType:     config.MountType,
		options:       config.overlayOptions(),
	}
	if err := s.open(ctx, root); err != nil {
		return nil, errors.Join(err, images.Close())
	}
	return s, nil
}

// Prepare answers the unpacker for a layer (AskedLayer) with
// errdefs.ErrAlreadyExists, which makes it skip the layer. It refuses every other extraction of a layer with
// errdefs.ErrFailedPrecondition. For a container it gives the guest mount if
// its parent is guest-pulled, and overlayfs's mounts if not.
func (s *snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	info, err := applyOpts(opts)
	if err != nil {
		return nil, err
	}
	if layer, ok := AskedLayer(key, info.Labels); ok {
		return nil, s.prepareLayer(ctx, layer, parent)
	}
	return s.create(ctx, key, parent, info, s.Snapshotter.Prepare)
}

// View is Prepare for a snapshot that is only read.
func (s *snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	info, err := applyOpts(opts)
	if err != nil {
		return nil, err
	}
	return s.create(ctx, key, parent, info, s.Snapshotter.View)
}

func (s *snapshotter) create(ctx context.Context, key, parent string, info snapshots.Info,
	create func(context.Context, string, string, ...snapshots.Opt) ([]mount.Mount, error),
) ([]mount.Mount, error) {
	if err := refuseContent(key, parent); err != nil {
		return nil, err
	}
	chain := ""
	switch {
	case isLayer(parent):
		// Stored without parent: were a layer without row reported as the
		// parent, containerd's garbage collector would hang this snapshot under
		// a node that it never visits, and keep it for ever.
		chain, parent = parent, ""
	case parent != "":
		p, err := s.Snapshotter.Stat(ctx, parent)
		if err != nil {
			return nil, fmt.Errorf("parent %q of snapshot %q: %w", parent, key, err)
		}
		chain = chainID(p)
	}
	info.Labels = withChainID(info.Labels, chain)
	delete(info.Labels, labelSnapshotRef) // of a pod that would like to be a layer

	mounts, err := create(ctx, key, parent, snapshots.WithLabels(info.Labels))
	if err != nil || chain == "" {
		return mounts, err
	}
	return s.guestMounts(info, mounts)
}

// Mounts gives the mounts that Prepare or View gave, after a restart too. A
// directory of a guest-pulled snapshot that went missing is made again.
func (s *snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	mounts, err := s.Snapshotter.Mounts(ctx, key)
	if err != nil {
		if errdefs.IsNotFound(err) && isLayer(key) {
			return nil, fmt.Errorf("layer %s is committed and has no mounts: %w", key, errdefs.ErrFailedPrecondition)
		}
		return nil, err
	}
	info, err := s.Snapshotter.Stat(ctx, key)
	if err != nil || chainID(info) == "" {
		return mounts, err
	}
	return s.guestMounts(info, mounts)
}

// Commit commits a container's snapshot. Of a guest-pulled one, only what was
// written through a mount on the host is in it; what the guest wrote is not
// here.
func (s *snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := s.Snapshotter.Stat(ctx, key)
	if err != nil {
		return err
	}
	return s.Snapshotter.Commit(ctx, name, key, append(opts[:len(opts):len(opts)], func(i *snapshots.Info) error {
		i.Labels = withChainID(i.Labels, chainID(info))
		return nil
	})...)
}

// Stat returns a committed snapshot for every layer, whether or not it was ever
// prepared.
func (s *snapshotter) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	info, err := s.Snapshotter.Stat(ctx, key)
	if errdefs.IsNotFound(err) && isLayer(key) {
		return layerInfo(key), nil
	}
	return info, err
}

// Usage of a layer is nothing.
func (s *snapshotter) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	usage, err := s.Snapshotter.Usage(ctx, key)
	if errdefs.IsNotFound(err) && isLayer(key) {
		return snapshots.Usage{}, nil
	}
	return usage, err
}

// Remove of a layer succeeds: there is nothing to remove, unless the older
// daemon left a row or the users of the layer's image are known.
func (s *snapshotter) Remove(ctx context.Context, key string) error {
	err := s.Snapshotter.Remove(ctx, key)
	if errdefs.IsNotFound(err) && isLayer(key) {
		err = nil
	}
	if err == nil && isLayer(key) {
		err = s.users.Forget(key)
	}
	return err
}

// Update changes labels. The chain ID of a guest-pulled snapshot stays.
func (s *snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	var updated snapshots.Info
	err := s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		info.Labels = withChainID(info.Labels, old.Labels[volume.MetadataChainID])
		updated, err = storage.UpdateInfo(ctx, info, fieldpaths...)
		return err
	})
	if errdefs.IsNotFound(err) && isLayer(info.Name) {
		return updateLayer(info, fieldpaths)
	}
	return updated, err
}

// Walk calls fn for the snapshots of the store. A layer is in no list, because any layer
// exists; one that the filters ask for by name is found. An exception are the top layers
// of images whose users are known: containerd's garbage collector removes what is in the
// list and unused (core/metadata/snapshot.go), and so they are forgotten with their image.
func (s *snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	if layer, ok := queriedLayer(filters); ok {
		return fn(ctx, layer)
	}
	if err := s.Snapshotter.Walk(ctx, fn, filters...); err != nil || len(filters) > 0 {
		return err
	}
	return s.walkKnown(ctx, fn)
}

// Cleanup removes the directories of snapshots that were removed. containerd's
// garbage collector calls it.
func (s *snapshotter) Cleanup(ctx context.Context) error {
	return errors.Join(
		s.removeDirectories(ctx),
		s.users.Cleanup(func(inUse func(chain string)) error {
			return s.Snapshotter.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
				if chain := chainID(info); chain != "" {
					inUse(chain)
				}
				return nil
			})
		}),
	)
}

// Close closes the databases.
func (s *snapshotter) Close() error {
	return errors.Join(s.Snapshotter.Close(), s.users.Close())
}

func applyOpts(opts []snapshots.Opt) (info snapshots.Info, err error) {
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return snapshots.Info{}, err
		}
	}
	info.Labels = maps.Clone(info.Labels) // the caller's
	return info, nil
}
