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
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/internal/guard"
)

func databasePath(root string) string { return filepath.Join(root, "metadata.db") }

// newMetaStore returns the store of containers' snapshots. It opens the database
// only when it is first used.
//
// Its changes are synced to the disk, for a container survives a loss of power although
// its processes do not: containerd's metadata has it, and who is no kubelet starts it
// again on the snapshot that it had (containerd, core/runtime/restart; nerdctl run
// --restart). Directories are not synced: a guest's is made again (Mounts), and one that
// came too early is removed (tryOpen).
func newMetaStore(root string) (*storage.MetaStore, error) {
	return storage.NewMetaStore(databasePath(root), func(o *bolt.Options) error {
		// The daemon that this plugin replaces may still be running.
		o.Timeout = 5 * time.Second
		return nil
	})
}

// open makes sure that the database can be used, and says what to do if it cannot.
func (s *snapshotter) open(ctx context.Context, root string) error {
	err := guard.Do(func() error { return s.tryOpen(ctx) })
	db := databasePath(root)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, berrors.ErrTimeout):
		return fmt.Errorf("open %s: another process has it open; stop the older snapshotter daemon, or give root_path a directory of its own: %w", db, err)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("open %s: make it writable and restart containerd: %w", db, err)
	}
	return fmt.Errorf("read %s: move the file away and restart containerd (images stay usable; containers of this snapshotter have to be made anew): %w", db, err)
}

// tryOpen reads the database. A new one gets its buckets, which a walk or a
// clean-up of the store expects.
//
// Directories that the database does not know are removed: they would be in the
// way of the next snapshots. There are some when the database is new because the
// old one was lost, as its numbers start again. There is one when containerd was
// killed after the overlay snapshotter had moved a snapshot's directory to its
// number and before it had committed that number, which is then given again.
func (s *snapshotter) tryOpen(ctx context.Context) error {
	err := s.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(context.Context, snapshots.Info) error { return nil })
	})
	isNew := errdefs.IsNotFound(err)
	if isNew {
		err = s.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
			const probe = "initialize"
			if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, probe, ""); err != nil {
				return err
			}
			_, _, err := storage.Remove(ctx, probe)
			return err
		})
	}
	if err == nil {
		err = s.Cleanup(ctx)
		if err != nil && !isNew {
			// On a full disk, for instance. The garbage collector tries again.
			log.G(ctx).WithError(err).Warn("directories of snapshots that were never committed were not removed")
			err = nil
		}
	}
	if err != nil {
		return errors.Join(err, s.ms.Close())
	}
	return nil
}
