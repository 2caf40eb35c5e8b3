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
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	bolt "go.etcd.io/bbolt"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/volume"
)

// chain returns the chain IDs of an image of n layers.
func chain(image string, n int) []string {
	diffs := make([]digest.Digest, n)
	for i := range diffs {
		diffs[i] = digest.FromString(fmt.Sprint(image, i))
	}
	ids := make([]string, n)
	for i, id := range identity.ChainIDs(diffs) {
		ids[i] = id.String()
	}
	return ids
}

// metadataStore puts containerd's own metadata store on top of a snapshotter,
// as in containerd.
func metadataStore(t testing.TB, s snapshots.Snapshotter) (*metadata.DB, snapshots.Snapshotter) {
	dir := t.TempDir()
	content, err := local.NewStore(filepath.Join(dir, "content"))
	require.NoError(t, err)
	db, err := bolt.Open(filepath.Join(dir, "meta.db"), 0o600, nil)
	require.NoError(t, err)
	t.Cleanup(func() { db.Close() })
	mdb := metadata.NewDB(db, content, map[string]snapshots.Snapshotter{"guest-pull": s})
	require.NoError(t, mdb.Init(t.Context()))
	return mdb, mdb.Snapshotter("guest-pull")
}

// pull does what containerd's unpacker does with each layer of an image
// (core/unpack/unpacker.go, topHalf).
func pull(ctx context.Context, s snapshots.Snapshotter, ids []string) error {
	parent := ""
	for _, id := range ids {
		key := fmt.Sprintf(snapshots.UnpackKeyFormat, fmt.Sprint(time.Now().UnixNano())+"-aB_3", id)
		_, err := s.Prepare(ctx, key, parent, snapshots.WithLabels(map[string]string{labelSnapshotRef: id}))
		if !errdefs.IsAlreadyExists(err) {
			return fmt.Errorf("prepare %s: want already exists, got %w", id, err)
		}
		info, err := s.Stat(ctx, id)
		if err != nil {
			return err
		}
		if info.Name != id || info.Parent != parent || info.Kind != snapshots.KindCommitted {
			return fmt.Errorf("stat %s on %q: %+v", id, parent, info)
		}
		parent = id
	}
	return nil
}

// The state of a layer is its name: a pull must leave the store byte for byte
// as it was.
func TestLayerCostsNothing(t *testing.T) {
	root := t.TempDir()
	s := newSnapshotter(t, root, Config{})
	_, ms := metadataStore(t, s)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")

	before, err := os.ReadFile(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	ids := chain("image", 60)
	require.NoError(t, pull(ctx, ms, ids))
	require.NoError(t, pull(ctx, ms, ids), "again")
	after, err := os.ReadFile(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	assert.Equal(t, before, after)
	assert.Empty(t, directories(t, root))

	usage, err := ms.Usage(ctx, ids[59])
	require.NoError(t, err)
	assert.Zero(t, usage)
	info, err := ms.Update(ctx, snapshots.Info{Name: ids[3], Labels: map[string]string{"a": "b"}}, "labels.a")
	require.NoError(t, err)
	assert.Equal(t, "b", info.Labels["a"])
}

// What a walk answers must not depend on the Prepare that came just before it:
// others come in between. Run with -race.
func TestConcurrentPulls(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), Config{})
	_, ms := metadataStore(t, s)
	base := chain("base", 5)

	var wg sync.WaitGroup
	errs := make(chan error, 64)
	for i := range 16 {
		wg.Go(func() {
			ctx := namespaces.WithNamespace(t.Context(), []string{"k8s.io", "default", "moby"}[i%3])
			errs <- pull(ctx, ms, base)
			ids := chain(fmt.Sprint("image", i/2), 10)
			errs <- pull(ctx, ms, ids)
			key := fmt.Sprint("container", i)
			_, err := ms.Prepare(ctx, key, ids[9])
			errs <- err
			errs <- ms.Remove(ctx, key)
		})
	}
	wg.Wait()
	close(errs)
	for err := range errs {
		assert.NoError(t, err)
	}
	// The metadata store only forgets what is removed through it; its garbage
	// collector removes the rows.
	require.NoError(t, s.Walk(t.Context(), func(ctx context.Context, i snapshots.Info) error {
		t.Cleanup(func() { assert.NoError(t, s.Remove(context.WithoutCancel(ctx), i.Name)) })
		return nil
	}))
}

// containerd's garbage collector builds a tree from Walk and prunes it from the
// roots: a container's snapshot under a parent that Walk does not report would
// stay for ever.
func TestGarbageCollection(t *testing.T) {
	root := t.TempDir()
	s := newSnapshotter(t, root, Config{})
	db, ms := metadataStore(t, s)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	ids := chain("image", 3)
	require.NoError(t, pull(ctx, ms, ids))
	_, err := ms.Prepare(ctx, "container", ids[2])
	require.NoError(t, err)
	require.Len(t, directories(t, root), 1)

	require.NoError(t, ms.Remove(ctx, "container"))
	_, err = db.GarbageCollect(ctx)
	require.NoError(t, err)
	assert.Empty(t, directories(t, root))
	require.NoError(t, ms.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		return fmt.Errorf("%s is left", i.Name)
	}))
}

// A garbage collection removes directories and commits nothing: each commit of the
// database waits for the disk twice.
func TestCleanupCommitsNothing(t *testing.T) {
	root := t.TempDir()
	ctx := t.Context()
	s := newSnapshotter(t, root, Config{})
	for _, key := range []string{"k8s.io/1/kept", "k8s.io/2/removed"} {
		_, err := s.Prepare(ctx, key, chain("image", 2)[1])
		require.NoError(t, err)
	}
	require.NoError(t, s.Remove(ctx, "k8s.io/2/removed"))
	require.Len(t, directories(t, root), 2)
	before, err := os.ReadFile(databasePath(root))
	require.NoError(t, err)
	require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))
	require.Len(t, directories(t, root), 1)
	after, err := os.ReadFile(databasePath(root))
	require.NoError(t, err)
	require.True(t, bytes.Equal(before, after), "the database was written")
}

func decode(t *testing.T, m mount.Mount) volume.Volume {
	t.Helper()
	v, err := volume.ParseOption(m.Options[len(m.Options)-1])
	require.NoError(t, err)
	return v
}

func TestGuestMount(t *testing.T) {
	root := t.TempDir()
	s := newSnapshotter(t, root, Config{MountOptions: []string{"index=on"}})
	ctx := t.Context()
	id := chain("image", 1)[0]

	mounts, err := s.Prepare(ctx, "k8s.io/1/container", id, snapshots.WithLabels(map[string]string{
		volume.MetadataManifestDigest:         "sha256:manifest",
		volume.MetadataLayersSize:             "4711",
		"containerd.io/snapshot/custom":       "hush",
		"containerd.io/snapshot/pullsecret":   "hush",
		"containerd.io/snapshot/pullusername": "hush",
		"other":                               "hush",
		volume.MetadataChainID:                "sha256:spoofed",
	}))
	require.NoError(t, err)
	require.Len(t, mounts, 1)
	dir := filepath.Join(root, "snapshots", directories(t, root)[0])
	m := mounts[0]
	assert.Equal(t, DefaultMountType, m.Type)
	assert.Equal(t, "overlay", m.Source)
	assert.Equal(t, []string{
		"workdir=" + dir + "/work",
		"upperdir=" + dir + "/fs",
		"lowerdir=" + root + "/users/static",
		"index=on",
	}, m.Options[:len(m.Options)-1])
	assert.Equal(t, volume.GuestPull(id, map[string]string{
		volume.MetadataChainID:        id,
		volume.MetadataManifestDigest: "sha256:manifest",
		volume.MetadataLayersSize:     "4711",
	}), decode(t, m))

	for _, d := range []string{dir + "/work", dir + "/fs", root + "/users/static"} {
		assert.DirExists(t, d)
	}
	again, err := s.Mounts(ctx, "k8s.io/1/container")
	require.NoError(t, err)
	assert.Equal(t, mounts, again)

	// What the metadata store reports as the parent is its own record; here,
	// the snapshot has none (see TestGarbageCollection).
	info, err := s.Stat(ctx, "k8s.io/1/container")
	require.NoError(t, err)
	assert.Empty(t, info.Parent)
	assert.Equal(t, id, info.Labels[volume.MetadataChainID])

	view, err := s.View(ctx, "k8s.io/2/view", id)
	require.NoError(t, err)
	require.Len(t, view, 1)
	assert.Equal(t, DefaultMountType, view[0].Type)
	assert.Regexp(t, `^lowerdir=`+root+`/snapshots/\d+/fs:`+root+`/users/static$`, view[0].Options[0])
	assert.Equal(t, id, decode(t, view[0]).Source)
	require.NoError(t, s.Remove(ctx, "k8s.io/2/view"))

	require.NoError(t, s.Remove(ctx, "k8s.io/1/container"))
	_, err = s.Mounts(ctx, "k8s.io/1/container")
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
}

// A restart must not change what a running container's mounts are, and neither
// a wiped directory nor a change of labels may turn a guest mount into a bind of
// an empty directory.
func TestMountsAfterRestart(t *testing.T) {
	root := t.TempDir()
	ctx := t.Context()
	s, err := New(ctx, root, Config{})
	require.NoError(t, err)
	id := chain("image", 2)[1]
	mounts, err := s.Prepare(ctx, "k8s.io/1/container", id)
	require.NoError(t, err)
	view, err := s.View(ctx, "k8s.io/2/view", id)
	require.NoError(t, err)
	_, err = s.Update(ctx, snapshots.Info{Name: "k8s.io/1/container", Labels: nil}, "labels")
	require.NoError(t, err)
	require.NoError(t, s.Close())

	for _, d := range append(directories(t, root), "../users/static") {
		require.NoError(t, os.RemoveAll(filepath.Join(root, "snapshots", d)))
	}
	s = newSnapshotter(t, root, Config{})
	again, err := s.Mounts(ctx, "k8s.io/1/container")
	require.NoError(t, err)
	assert.Equal(t, mounts, again)
	viewAgain, err := s.Mounts(ctx, "k8s.io/2/view")
	require.NoError(t, err)
	assert.Equal(t, view, viewAgain)
	for _, o := range append(again[0].Options[:3], view[0].Options[0]) {
		_, dirs, _ := strings.Cut(o, "=")
		for d := range strings.SplitSeq(dirs, ":") {
			assert.DirExists(t, d)
		}
	}
	require.NoError(t, s.Remove(ctx, "k8s.io/2/view"))
	_, err = s.Usage(ctx, "k8s.io/1/container")
	require.NoError(t, err)
}

// A snapshot that was committed on top of a guest-pulled image is one still; one
// that was not, is not, whatever its labels say.
func TestAncestry(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), Config{})
	ctx := t.Context()
	id := chain("image", 1)[0]
	spoof := snapshots.WithLabels(map[string]string{volume.MetadataChainID: id})

	_, err := s.Prepare(ctx, "k8s.io/1/build", id)
	require.NoError(t, err)
	require.NoError(t, s.Commit(ctx, "k8s.io/2/built", "k8s.io/1/build"))
	mounts, err := s.Prepare(ctx, "k8s.io/3/container", "k8s.io/2/built")
	require.NoError(t, err)
	assert.Equal(t, DefaultMountType, mounts[0].Type)
	assert.Equal(t, id, decode(t, mounts[0]).ImagePull.Metadata[volume.MetadataChainID])
	assert.Contains(t, mounts[0].Options[2], "/fs", "the committed directory is the lowerdir")
	assert.ErrorIs(t, s.Remove(ctx, "k8s.io/2/built"), errdefs.ErrFailedPrecondition, "it has a child")

	mounts, err = s.Prepare(ctx, "k8s.io/4/base", "", spoof)
	require.NoError(t, err)
	assert.Equal(t, "bind", mounts[0].Type)
	require.NoError(t, s.Commit(ctx, "k8s.io/5/base", "k8s.io/4/base", spoof))
	mounts, err = s.Prepare(ctx, "k8s.io/6/container", "k8s.io/5/base", spoof)
	require.NoError(t, err)
	assert.Equal(t, "overlay", mounts[0].Type)
	_, err = s.Update(ctx, snapshots.Info{Name: "k8s.io/6/container", Labels: map[string]string{volume.MetadataChainID: id}})
	require.NoError(t, err)
	mounts, err = s.Mounts(ctx, "k8s.io/6/container")
	require.NoError(t, err)
	assert.Equal(t, "overlay", mounts[0].Type)
}

// Every refusal has its kind, says what to do, and changes nothing.
func TestRefusals(t *testing.T) {
	root := t.TempDir()
	s := newSnapshotter(t, root, Config{})
	ctx := t.Context()
	id := chain("image", 1)[0]
	_, err := s.Prepare(ctx, "k8s.io/1/container", id)
	require.NoError(t, err)
	before, err := os.ReadFile(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	target := func(v string) snapshots.Opt {
		return snapshots.WithLabels(map[string]string{labelSnapshotRef: v})
	}

	for name, c := range map[string]struct {
		do   func() error
		kind error
		says string
	}{
		"extraction without target": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-123-a_B- "+id, "")
			return err
		}, errdefs.ErrFailedPrecondition, "keeps image content off the host"},
		"extraction without target or prefix": {func() error {
			_, err := s.Prepare(ctx, "extract-123-a_B- "+id, "")
			return err
		}, errdefs.ErrFailedPrecondition, "pull the image for a runtime handler"},
		"image volume": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7//run/containerd/io.containerd.grpc.v1.cri/image-volumes/pod/image", id)
			return err
		}, errdefs.ErrFailedPrecondition, "would be empty"},
		"malformed target": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-1-a "+id, "", target("sha256:short"))
			return err
		}, errdefs.ErrFailedPrecondition, "keeps image content off the host"},
		"target that is no chain ID in the key either": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-1-a sha256:short", "", target("sha256:short"))
			return err
		}, errdefs.ErrFailedPrecondition, "keeps image content off the host"},
		"target of another key": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-1-a "+id, "", target(digest.FromString("another").String()))
			return err
		}, errdefs.ErrFailedPrecondition, "the same layer as the key"},
		"empty target": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-1-a "+id, "", target(""))
			return err
		}, errdefs.ErrFailedPrecondition, "containerd.io/snapshot.ref"},
		"layer on an unknown parent": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/extract-1-a "+id, "k8s.io/6/unknown", target(id))
			return err
		}, errdefs.ErrNotFound, "unknown"},
		"unknown parent": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/7/container", "k8s.io/6/unknown")
			return err
		}, errdefs.ErrNotFound, "unknown"},
		"duplicate key": {func() error {
			_, err := s.Prepare(ctx, "k8s.io/1/container", id)
			return err
		}, errdefs.ErrAlreadyExists, "k8s.io/1/container"},
		"mounts of a layer": {func() error {
			_, err := s.Mounts(ctx, id)
			return err
		}, errdefs.ErrFailedPrecondition, "no mounts"},
		"update of a layer's parent": {func() error {
			_, err := s.Update(ctx, snapshots.Info{Name: id}, "parent")
			return err
		}, errdefs.ErrInvalidArgument, `"parent"`},
		"unknown snapshot": {func() error {
			_, err := s.Stat(ctx, "k8s.io/9/unknown")
			return errors.Join(err, s.Remove(ctx, "k8s.io/9/unknown"))
		}, errdefs.ErrNotFound, ""},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.do()
			require.ErrorIs(t, err, c.kind)
			assert.Contains(t, err.Error(), c.says)
		})
	}
	after, err := os.ReadFile(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	assert.Equal(t, before, after)
	assert.Len(t, directories(t, root), 1)
}

// Annotations of a pod become labels of its sandbox's snapshot. None of them makes
// it a layer: it would be recorded under a name that its author chose, on top of
// the pause image, and stand in the way of the image that has that name.
func TestPodsAreNoLayers(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), Config{})
	_, ms := metadataStore(t, s)
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	pause, image := chain("pause", 1)[0], chain("image", 1)[0]
	require.NoError(t, pull(ctx, ms, []string{pause}))

	labels := map[string]string{
		labelSnapshotRef:                        image,
		"containerd.io/snapshot/diff-id":        image,
		"containerd.io/snapshot/cri.image-ref":  "registry.example/other:1",
		"containerd.io/snapshot/pullsecret":     "secret",
		"containerd.io/snapshot/cri.layer-size": "-1",
		volume.MetadataChainID:                  image,
	}
	given := maps.Clone(labels)
	mounts, err := ms.Prepare(ctx, "sandbox", pause, snapshots.WithLabels(labels))
	require.NoError(t, err)
	assert.Equal(t, given, labels, "the caller's own")
	require.Len(t, mounts, 1)
	assert.Equal(t, map[string]string{volume.MetadataChainID: pause}, decode(t, mounts[0]).ImagePull.Metadata)
	_, err = ms.Stat(ctx, image)
	require.ErrorIs(t, err, errdefs.ErrNotFound)
	require.NoError(t, s.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		assert.NotContains(t, i.Labels, labelSnapshotRef)
		return nil
	}))

	require.NoError(t, pull(ctx, ms, []string{image}), "the image that has the name")
	mounts, err = ms.Prepare(ctx, "container", image)
	require.NoError(t, err)
	assert.Equal(t, image, decode(t, mounts[0]).ImagePull.Metadata[volume.MetadataChainID])
}

// Only the metadata store's own question is answered with a layer.
func TestWalk(t *testing.T) {
	s := newSnapshotter(t, t.TempDir(), Config{})
	ctx := t.Context()
	ids := chain("image", 2)
	walk := func(filters ...string) (found []snapshots.Info) {
		t.Helper()
		require.NoError(t, s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
			found = append(found, i)
			return nil
		}, filters...))
		return found
	}
	// The format of core/metadata/snapshot.go, createSnapshot.
	query := func(target, parent string) string {
		return fmt.Sprintf(`labels.%q==%s,parent==%q`, labelSnapshotRef, target, parent)
	}

	assert.Empty(t, walk())
	for _, parent := range []string{"", ids[0], `k8s.io/3/o"dd`} {
		found := walk(query(ids[1], parent))
		require.Len(t, found, 1)
		assert.Equal(t, ids[1], found[0].Name)
		assert.Equal(t, parent, found[0].Parent)
		assert.Equal(t, ids[1], found[0].Labels[labelSnapshotRef])
		assert.Equal(t, snapshots.KindCommitted, found[0].Kind)
		assert.WithinDuration(t, time.Now(), found[0].Created, time.Minute)
	}
	assert.Empty(t, walk("kind==committed"))
	assert.Empty(t, walk(query("nodigest", "")))
	assert.Empty(t, walk(query(ids[1], "")+",kind==active"))

	_, err := s.Prepare(ctx, "k8s.io/1/a", "", snapshots.WithLabels(map[string]string{"x": "y"}))
	require.NoError(t, err)
	assert.Len(t, walk(), 1)
	assert.Len(t, walk("labels.x==y"), 1)
	assert.Empty(t, walk("labels.x==z"))
	_, err = s.(*snapshotter).Snapshotter.Stat(ctx, ids[0])
	assert.ErrorIs(t, err, errdefs.ErrNotFound)
	wantErr := errors.New("stop")
	assert.ErrorIs(t, s.Walk(ctx, func(context.Context, snapshots.Info) error { return wantErr }), wantErr)
}

// legacyRoot writes what the older daemon leaves: the same schema, layers as
// committed rows with directories, containers as their children.
func legacyRoot(t *testing.T, root string, ids []string) {
	t.Helper()
	ms, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
	require.NoError(t, err)
	mkdirs := func(id string) {
		for _, d := range []string{"fs", "work"} {
			require.NoError(t, os.MkdirAll(filepath.Join(root, "snapshots", id, d), 0o755))
		}
	}
	require.NoError(t, ms.WithTransaction(t.Context(), true, func(ctx context.Context) error {
		parent := ""
		for _, id := range ids {
			labels := snapshots.WithLabels(map[string]string{labelSnapshotRef: id})
			s, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "extract "+id, parent, labels)
			if err != nil {
				return err
			}
			mkdirs(s.ID)
			if _, err := storage.CommitActive(ctx, "extract "+id, id, snapshots.Usage{Size: 4096, Inodes: 1}, labels); err != nil {
				return err
			}
			parent = id
		}
		s, err := storage.CreateSnapshot(ctx, snapshots.KindActive, "k8s.io/9/old", parent)
		if err == nil {
			mkdirs(s.ID)
		}
		return err
	}))
	require.NoError(t, ms.Close())
}

func TestRootOfOlderDaemon(t *testing.T) {
	root := t.TempDir()
	ids := chain("old", 60)
	legacyRoot(t, root, ids)
	s := newSnapshotter(t, root, Config{SyncRemove: true})
	ctx := t.Context()

	mounts, err := s.Mounts(ctx, "k8s.io/9/old")
	require.NoError(t, err)
	assert.Equal(t, DefaultMountType, mounts[0].Type)
	assert.Equal(t, ids[59], decode(t, mounts[0]).ImagePull.Metadata[volume.MetadataChainID])
	assert.Less(t, len(strings.Join(mounts[0].Options, ",")), 4096)

	info, err := s.Stat(ctx, ids[59])
	require.NoError(t, err)
	assert.Equal(t, ids[58], info.Parent, "the old row")
	usage, err := s.Usage(ctx, ids[59])
	require.NoError(t, err)
	assert.EqualValues(t, 4096, usage.Size)

	mounts, err = s.Prepare(ctx, "k8s.io/10/new", ids[59])
	require.NoError(t, err)
	assert.Equal(t, DefaultMountType, mounts[0].Type)
	_, ms := metadataStore(t, s)
	require.NoError(t, pull(namespaces.WithNamespace(ctx, "k8s.io"), ms, ids), "pulled again")

	assert.ErrorIs(t, s.Remove(ctx, ids[59]), errdefs.ErrFailedPrecondition, "the old container is its child")
	require.NoError(t, s.Remove(ctx, "k8s.io/10/new"))
	require.NoError(t, s.Remove(ctx, "k8s.io/9/old"))
	for i := range ids {
		require.NoError(t, s.Remove(ctx, ids[len(ids)-1-i]))
	}
	assert.Empty(t, directories(t, root))
}

// The numbers of a new database start again. Directories of a lost one would
// make every Prepare fail with "file exists", for ever.
func TestLostDatabase(t *testing.T) {
	for name, lose := range map[string]func(path string) error{
		"removed":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			legacyRoot(t, root, chain("old", 3))
			require.NoError(t, lose(filepath.Join(root, "metadata.db")))
			s := newSnapshotter(t, root, Config{})
			assert.Empty(t, directories(t, root))
			_, err := s.Prepare(t.Context(), "k8s.io/1/new", chain("old", 3)[2])
			require.NoError(t, err)
		})
	}
}

// The overlay snapshotter moves a snapshot's directory to its number before it
// commits that number. A kill in between leaves the directory, and the same number
// is given to the next snapshot, whose move would fail with "file exists" until the
// garbage collector came by.
func TestKilledBeforeCommit(t *testing.T) {
	root := t.TempDir()
	ctx := t.Context()
	s, err := New(ctx, root, Config{})
	require.NoError(t, err)
	id := chain("image", 2)[1]
	_, err = s.Prepare(ctx, "k8s.io/1/first", id)
	require.NoError(t, err)
	first := directories(t, root)
	_, err = s.Prepare(ctx, "k8s.io/2/second", id)
	require.NoError(t, err)
	var number string
	for _, d := range directories(t, root) {
		if !slices.Contains(first, d) {
			number = d
		}
	}
	require.NoError(t, s.Remove(ctx, "k8s.io/2/second"))
	require.NoError(t, s.Close())
	// The state after the kill: the database is from before the second Prepare,
	// as far as the next number goes, and the directories from after it.
	next, err := strconv.Atoi(number)
	require.NoError(t, err)
	for _, n := range []int{next, next + 1} {
		require.NoError(t, os.MkdirAll(filepath.Join(root, "snapshots", strconv.Itoa(n), "fs"), 0o755))
	}

	s = newSnapshotter(t, root, Config{})
	require.Equal(t, first, directories(t, root))
	_, err = s.Prepare(ctx, "k8s.io/3/third", id)
	require.NoError(t, err)
}

// bbolt panics on damaged pages and faults on a file that is too short. In
// containerd, either would take the node down, start after start.
func TestUnreadableDatabase(t *testing.T) {
	for name, damage := range map[string]func(t *testing.T, path string){
		"half": func(t *testing.T, path string) {
			require.NoError(t, os.Truncate(path, 12*1024))
		},
		"garbage pages": func(t *testing.T, path string) {
			b, err := os.ReadFile(path)
			require.NoError(t, err)
			for i := 8192; i < len(b); i++ {
				b[i] ^= 0x5a
			}
			require.NoError(t, os.WriteFile(path, b, 0o600))
		},
		"no database": func(t *testing.T, path string) {
			require.NoError(t, os.WriteFile(path, []byte(strings.Repeat("text\n", 10000)), 0o600))
		},
		"directory": func(t *testing.T, path string) {
			require.NoError(t, os.Remove(path))
			require.NoError(t, os.Mkdir(path, 0o700))
		},
		"in use": func(t *testing.T, path string) {
			db, err := bolt.Open(path, 0o600, nil)
			require.NoError(t, err)
			t.Cleanup(func() { db.Close() })
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			legacyRoot(t, root, chain("old", 40))
			path := filepath.Join(root, "metadata.db")
			damage(t, path)
			before := directories(t, root)
			content, readErr := os.ReadFile(path)

			_, err := New(t.Context(), root, Config{})
			require.Error(t, err)
			assert.Contains(t, err.Error(), path)
			t.Log(err)
			assert.Equal(t, before, directories(t, root))
			if readErr == nil {
				after, err := os.ReadFile(path)
				require.NoError(t, err)
				assert.Equal(t, content, after)
			}
		})
	}
}

func TestRefusesRoot(t *testing.T) {
	for _, root := range []string{"", "relative/root", "/a,b", "/a:b", "/a b", "/a\nb", `/a\b`, "/a$(b)", "/a'b"} {
		_, err := New(t.Context(), root, Config{MountType: "overlay"})
		assert.ErrorIs(t, err, errdefs.ErrInvalidArgument)
		assert.ErrorContains(t, err, "root_path", root)
		assert.ErrorContains(t, err, "mount_type", "all problems at once")
	}
}

// d_type and writability are properties of a mounted file system.
func TestRefusesFileSystem(t *testing.T) {
	requireRoot(t)
	t.Run("read-only", func(t *testing.T) {
		dir := t.TempDir()
		require.NoError(t, mount.All([]mount.Mount{{Type: "tmpfs", Source: "tmpfs", Options: []string{"ro"}}}, dir))
		t.Cleanup(func() { require.NoError(t, mount.UnmountAll(dir, 0)) })
		_, err := New(t.Context(), filepath.Join(dir, "root"), Config{})
		assert.ErrorContains(t, err, "read-only file system")
		assert.ErrorContains(t, err, dir)
	})
	t.Run("no d_type", func(t *testing.T) {
		image := filepath.Join(t.TempDir(), "image")
		out, err := exec.Command("mke2fs", "-q", "-t", "ext4", "-O", "^filetype", image, "8m").CombinedOutput()
		require.NoError(t, err, "%s (mke2fs is in the package e2fsprogs)", out)
		dir := t.TempDir()
		require.NoError(t, mount.All([]mount.Mount{{Type: "ext4", Source: image, Options: []string{"loop"}}}, dir))
		t.Cleanup(func() { require.NoError(t, mount.UnmountAll(dir, 0)) })
		_, err = New(t.Context(), dir, Config{})
		assert.ErrorContains(t, err, "d_type")
		assert.NoFileExists(t, filepath.Join(dir, "metadata.db"))
	})
}

func TestValidate(t *testing.T) {
	for _, c := range []Config{
		{},
		{MountType: "fuse.guest-pull-overlayfs"},
		{MountType: "fuse./usr/local/bin/nydus-overlayfs-guest-pull"},
		{MountType: "fuse./root/.local/bin/nydus-overlayfs-guest-pull"},
		{MountOptions: []string{"volatile", "metacopy=on"}},
	} {
		assert.NoError(t, c.Validate(), "%+v", c)
	}
	for key, values := range map[string][]Config{
		"mount_type": {
			{MountType: "overlay"}, {MountType: "fuse."}, {MountType: "fuse3.x"}, {MountType: "fuse.a/b"}, {MountType: "fuse./a/../b"},
			{MountType: "fuse./a/."}, {MountType: "fuse./.."}, {MountType: "fuse..x"},
			{MountType: "fuse./a//b"}, {MountType: "fuse.a b"}, {MountType: "fuse.a;b"}, {MountType: "fuse.a\n"}, {MountType: "fuse./"},
		},
		"resolve_users": {{Users: users.Config{Resolve: "on"}}, {Users: users.Config{Resolve: "Registry"}}},
		"users":         {{Users: users.Config{Users: map[string]string{"nginx": "nginx"}}}},
		"groups.adm":    {{Users: users.Config{Groups: map[string]users.Group{"adm": {}}}}},
		"mount_options": {
			{MountOptions: []string{""}}, {MountOptions: []string{"a,b"}}, {MountOptions: []string{"a b"}}, {MountOptions: []string{"a\n"}},
			{MountOptions: []string{"lowerdir=/x"}}, {MountOptions: []string{"upperdir=/x"}}, {MountOptions: []string{"io.katacontainers.volume=x"}},
		},
	} {
		for _, c := range values {
			err := c.Validate()
			assert.ErrorIs(t, err, errdefs.ErrInvalidArgument, "%+v", c)
			assert.ErrorContains(t, err, key)
		}
	}
}

func FuzzQueriedLayer(f *testing.F) {
	id := chain("image", 1)[0]
	f.Add(fmt.Sprintf(`labels.%q==%s,parent==%q`, labelSnapshotRef, id, ""))
	f.Add(fmt.Sprintf(`labels.%q==%s,parent==%q`, labelSnapshotRef, id, id))
	f.Add(`kind==active`)
	f.Fuzz(func(t *testing.T, filter string) {
		info, ok := queriedLayer([]string{filter})
		if !ok {
			return
		}
		assert.True(t, isLayer(info.Name))
		assert.Contains(t, filter, info.Name)
	})
}
