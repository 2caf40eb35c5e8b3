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

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	bolt "go.etcd.io/bbolt"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
)

// layersPerImage is how many layers the images have that are made of names only.
const layersPerImage = 20

// openBackend opens a snapshotter that a comparison is about, by its name. Unsafe
// leaves out what makes overlayfs's writes durable, to fill a store quickly.
func openBackend(ctx context.Context, kind, root string, unsafe bool) (snapshots.Snapshotter, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	switch kind {
	case guestPull, atOnce:
		return snapshotter.New(ctx, root, snapshotter.Config{})
	case overlayfs:
		ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"), func(o *bolt.Options) error {
			o.NoSync = unsafe
			return nil
		})
		if err != nil {
			return nil, err
		}
		return overlay.NewSnapshotter(root, overlay.WithMetaStore(ms), overlay.AsynchronousRemove)
	case rowPerLayer:
		ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
		return &rows{ms: ms}, err
	case nothing:
		return noBackend{}, nil
	}
	return nil, fmt.Errorf("no backend is called %q", kind)
}

// The backends.
const (
	guestPull   = "guest-pull"
	overlayfs   = "overlayfs"
	nothing     = "nothing"
	rowPerLayer = "a row for each layer"
	// atOnce is guest-pull as containerd pulls with it.
	atOnce = "all layers of an image at once"
	// overProxy is guest-pull in another process, as a proxy plugin.
	overProxy = "guest-pull over a proxy socket"
)

// store is containerd's metadata store over a backend, as containerd opens it.
type store struct {
	*metadata.DB
	sn      snapshots.Snapshotter // the backend, through the metadata store
	backend snapshots.Snapshotter
	bolt    *bolt.DB
	images  int // how many have been made
}

// openStore opens a store below a directory. Unsafe leaves out what makes writes
// durable, like containerd's no_sync.
func openStore(ctx context.Context, dir string, backend snapshots.Snapshotter, unsafe bool) (*store, error) {
	return openMetadata(ctx, metadataFiles{
		db:      filepath.Join(dir, "meta.db"),
		content: filepath.Join(dir, "content"),
	}, backendName, backend, unsafe)
}

// metadataFiles is where a store's database and contents are.
type metadataFiles struct{ db, content string }

func openMetadata(ctx context.Context, files metadataFiles, name string, backend snapshots.Snapshotter, unsafe bool) (*store, error) {
	opts := *bolt.DefaultOptions // as containerd's plugins/metadata sets them
	opts.NoFreelistSync = true
	opts.NoStatistics = true
	opts.NoSync, opts.NoGrowSync = unsafe, unsafe
	if err := os.MkdirAll(filepath.Dir(files.db), 0o700); err != nil {
		return nil, err
	}
	db, err := bolt.Open(files.db, 0o600, &opts)
	if err != nil {
		return nil, err
	}
	cs, err := local.NewStore(files.content)
	if err != nil {
		return nil, errors.Join(err, db.Close())
	}
	mdb := metadata.NewDB(db, cs, map[string]snapshots.Snapshotter{name: backend})
	if err := mdb.Init(ctx); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	return &store{DB: mdb, sn: mdb.Snapshotter(name), backend: backend, bolt: db}, nil
}

// backendName is the name that the metadata store has for every backend, so that
// the databases of contenders are alike.
const backendName = "snapshotter"

func (s *store) Close() error { return errors.Join(s.DB.Close(), s.backend.Close()) }

// namespace is containerd's for CRI, in which the comparisons work.
func namespace(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, harness.CRINamespace)
}

// image is the names of an image's layers and what CRI's unpacker labels them
// with (containerd, core/unpack/unpacker.go).
type image struct {
	diffIDs []digest.Digest
	chain   []string
	labels  []map[string]string
}

func newImage(name string, layers int) image {
	var i image
	for l := range layers {
		i.diffIDs = append(i.diffIDs, digest.FromString(name+" diff "+strconv.Itoa(l)))
	}
	for l, chainID := range identity.ChainIDs(slices.Clone(i.diffIDs)) {
		labels := map[string]string{
			snapshots.LabelSnapshotRef:    chainID.String(),
			snapshots.LabelSnapshotDiffID: i.diffIDs[l].String(),
		}
		if l > 0 {
			labels["containerd.io/snapshot/parent-chain-id"] = i.chain[l-1]
		}
		i.chain, i.labels = append(i.chain, chainID.String()), append(i.labels, labels)
	}
	return i
}

func (i image) top() string { return i.chain[len(i.chain)-1] }

func (i image) parent(layer int) string {
	if layer == 0 {
		return ""
	}
	return i.chain[layer-1]
}

// prepare makes the calls by which containerd's unpacker gets an image's layers
// to exist. A backend that has to be given a layer's content gets none: the
// comparison is about the calls, and kind to that backend.
func prepare(ctx context.Context, sn snapshots.Snapshotter, i image) error {
	for l := range i.chain {
		if err := prepareLayer(ctx, sn, i, l); err != nil {
			return fmt.Errorf("layer %d: %w", l, err)
		}
	}
	return nil
}

func prepareLayer(ctx context.Context, sn snapshots.Snapshotter, i image, l int) error {
	chainID := i.chain[l]
	key := fmt.Sprintf(snapshots.UnpackKeyFormat, "bench-"+strconv.Itoa(l), chainID)
	opt := snapshots.WithLabels(i.labels[l])
	_, err := sn.Prepare(ctx, key, i.parent(l), opt)
	switch {
	case errdefs.IsAlreadyExists(err):
		_, err = sn.Stat(ctx, chainID)
	case err == nil:
		err = sn.Commit(ctx, chainID, key, opt)
	}
	return err
}

// batchPreparer is unpack.BatchPreparer of the patched containerd.
type batchPreparer interface {
	PrepareBatch(ctx context.Context, f func(prepare func(key, parent string, opts ...snapshots.Opt) error) error) error
}

// prepareAtOnce prepares all layers of an image at once, as the unpacker does for
// the guest-pull snapshotter.
func prepareAtOnce(ctx context.Context, sn snapshots.Snapshotter, i image) error {
	p, ok := sn.(batchPreparer)
	if !ok {
		return errors.New("the benchmarks are linked with a containerd that cannot prepare layers at once: use `make bench`, or -modfile as in the Makefile")
	}
	return p.PrepareBatch(ctx, func(prepare func(key, parent string, opts ...snapshots.Opt) error) error {
		for l, chainID := range i.chain {
			key := fmt.Sprintf(snapshots.UnpackKeyFormat, "bench", chainID)
			err := prepare(key, i.parent(l), snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: chainID}))
			if !errdefs.IsAlreadyExists(err) {
				return fmt.Errorf("layer %d is to be there already: %w", l, err)
			}
		}
		return nil
	})
}

// timeImage measures how long it takes to prepare a new image with a kind of
// backend, under a lease as in a pull, and returns the seconds for each layer.
func (s *store) timeImage(ctx context.Context, kind, name string, layers int) (float64, error) {
	f := prepare
	if kind == atOnce {
		f = prepareAtOnce
	}
	s.images++
	manager := metadata.NewLeaseManager(s.DB)
	lease, err := manager.Create(ctx, leases.WithRandomID())
	if err != nil {
		return 0, err
	}
	i := newImage(fmt.Sprintf("%s-%d", name, s.images), layers)
	took, err := timed(func() error { return f(leases.WithLease(ctx, lease.ID), s.sn, i) })
	return took / float64(layers), errors.Join(err, manager.Delete(ctx, lease))
}

// countWrites returns how many times bbolt writes to its file for each layer of a new
// image. The database's statistics stay off, as in containerd: a transaction has its
// own.
func (s *store) countWrites(ctx context.Context, layers int) (float64, error) {
	i := newImage("counted", layers)
	writes := int64(0)
	for l := range i.chain {
		var tx *bolt.Tx
		err := s.Update(func(t *bolt.Tx) error {
			tx = t
			return prepareLayer(boltutil.WithTransaction(ctx, t), s.sn, i, l)
		})
		if err != nil {
			return 0, fmt.Errorf("layer %d: %w", l, err)
		}
		stats := tx.Stats()
		writes += stats.GetWrite()
	}
	return float64(writes) / float64(layers), nil
}

// fill records layers in the metadata store, in a few large transactions. The
// garbage collector leaves them alone.
func (s *store) fill(ctx context.Context, name string, layers int) error {
	const batch = 50
	for done := 0; done < layers; {
		err := s.Update(func(tx *bolt.Tx) error {
			ctx := boltutil.WithTransaction(ctx, tx)
			for range batch {
				n := min(layersPerImage, layers-done)
				if n == 0 {
					return nil
				}
				img := newImage(fmt.Sprintf("%s-%d", name, done), n)
				img.labels[n-1]["containerd.io/gc.root"] = "benchmark"
				if err := prepare(ctx, s.sn, img); err != nil {
					return err
				}
				done += n
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("fill the metadata store: %w", err)
		}
	}
	return nil
}

// noBackend is a backend that does nothing: it has every layer that it is asked
// for. What remains is the cost of the metadata store, which no backend can go
// below.
type noBackend struct{ snapshots.Snapshotter }

func (noBackend) Prepare(_ context.Context, _, _ string, _ ...snapshots.Opt) ([]mount.Mount, error) {
	return nil, errdefs.ErrAlreadyExists
}

// Walk is only ever called by the metadata store here, with its own filter, which
// is `labels."containerd.io/snapshot.ref"==<layer>,parent==<quoted parent>`.
func (noBackend) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	ref, parent, _ := strings.Cut(filters[0], `,parent==`)
	ref = ref[strings.Index(ref, "==")+2:]
	parent = strings.Trim(parent, `"`)
	return fn(ctx, snapshots.Info{
		Kind: snapshots.KindCommitted, Name: ref, Parent: parent,
		Labels: map[string]string{snapshots.LabelSnapshotRef: ref},
	})
}

func (noBackend) Stat(_ context.Context, key string) (snapshots.Info, error) {
	return snapshots.Info{Kind: snapshots.KindCommitted, Name: key}, nil
}

func (noBackend) Close() error { return nil }

// rows is a backend that keeps a row of its own for each layer and finds it
// again by a walk, which is what remote snapshotters that are built on
// containerd's storage package do.
type rows struct {
	snapshots.Snapshotter
	ms *storage.MetaStore
}

func (r *rows) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, opt := range opts {
		if err := opt(&info); err != nil {
			return nil, err
		}
	}
	target := info.Labels[snapshots.LabelSnapshotRef]
	err := r.ms.WithTransaction(ctx, true, func(ctx context.Context) error {
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, parent, opts...); err != nil {
			return err
		}
		_, err := storage.CommitActive(ctx, key, target, snapshots.Usage{}, opts...)
		return err
	})
	if err != nil {
		return nil, err
	}
	return nil, errdefs.ErrAlreadyExists
}

func (r *rows) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return r.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, fn, filters...)
	})
}

func (r *rows) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = r.ms.WithTransaction(ctx, false, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return info, err
}

func (r *rows) Close() error { return r.ms.Close() }

// fillRows puts rows for containers into a snapshotter's own database. Their
// directories are not made: nothing that is measured looks at them.
func fillRows(ctx context.Context, path string, n int, kind snapshots.Kind) error {
	ms, err := storage.NewMetaStore(path, func(o *bolt.Options) error {
		o.NoSync = true
		return nil
	})
	if err != nil {
		return err
	}
	const batch = 1000
	for at := range slices.Chunk(slices.Collect(count(n)), batch) {
		err = ms.WithTransaction(ctx, true, func(ctx context.Context) error {
			for _, i := range at {
				if err := fillRow(ctx, i, kind); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return errors.Join(fmt.Errorf("fill %s: %w", path, err), ms.Close())
		}
	}
	return ms.Close()
}

func count(n int) func(yield func(int) bool) {
	return func(yield func(int) bool) {
		for i := range n {
			if !yield(i) {
				return
			}
		}
	}
}

func fillRow(ctx context.Context, i int, kind snapshots.Kind) error {
	name := digest.FromString("filler " + strconv.Itoa(i)).String()
	labels := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name})
	key := fmt.Sprintf("%s/%d/%s", harness.CRINamespace, i, name)
	if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, key, "", labels); err != nil {
		return err
	}
	if kind != snapshots.KindCommitted {
		return nil
	}
	_, err := storage.CommitActive(ctx, key, name, snapshots.Usage{}, labels)
	return err
}
