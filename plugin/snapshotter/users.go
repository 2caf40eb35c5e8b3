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
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// Values of Config.ResolveUsers.
const (
	// ResolveUsersOff leaves image layers alone. It is the default.
	ResolveUsersOff = "off"
	// ResolveUsersRegistry reads the users and groups of an image out of its
	// layers in the registry when the image is pulled.
	ResolveUsersRegistry = "registry"
)

// LayerObserver is what a patched containerd tells of its pulls: an interface of
// its own (core/unpack/observer.go, after patches/containerd) that the plugin has
// to implement. The snapshotter that New returns implements it.
type LayerObserver interface {
	// LayersPrepared is called in a pull when all layers of an image, the lowest
	// first, have been prepared. fetch opens one of them, with the pull's own
	// credentials and hosts, and must not be used after LayersPrepared has
	// returned. An error fails the pull.
	LayersPrepared(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest,
		fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error)) error
	// NeedsLayers tells whether an image has to be pulled again before a
	// container of it can be created: LayersPrepared was not called for it, or
	// what came of it was lost.
	NeedsLayers(ctx context.Context, chainID string) (bool, error)
}

var _ LayerObserver = (*snapshotter)(nil)

// imageUsers gives containers the users and groups of their images: as the
// lowest directory of their mount, which has etc/passwd and etc/group and is
// otherwise as empty as the one that it stands in for. containerd looks there.
//
// These directories are made of what is known when they are needed, and can be
// removed at any time but while containerd reads them.
type imageUsers struct {
	root   string // of the directories, each named like the chain ID of its image
	static *users.Files
	known  *userStore // nil if nothing is read from registries
	// observe counts how pulled images fare; see Config.ObserveUsers.
	observe func(result string)

	mu sync.RWMutex // guards the directories

	readMu  sync.Mutex
	reading map[string]chan struct{} // closed when the image has been read
}

// staticUsers is the name of the directory for images of which nothing is known.
const staticUsers = "static"

func newImageUsers(ctx context.Context, root string, config Config) (*imageUsers, error) {
	u := &imageUsers{root: filepath.Join(root, "users"), reading: map[string]chan struct{}{}, observe: config.ObserveUsers}
	if u.observe == nil {
		u.observe = func(string) {}
	}
	if len(config.Users)+len(config.Groups) > 0 {
		files, err := users.Static(config.Users, config.Groups)
		if err != nil {
			return nil, err
		}
		u.static = &files
	}
	path := filepath.Join(root, "users.db")
	if config.ResolveUsers != ResolveUsersRegistry {
		// What was read when the option was set is not used without it.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove what was kept of images' users: %w", err)
		}
		return u, nil
	}
	var err error
	u.known, err = openUserStore(ctx, path)
	return u, err
}

func (u *imageUsers) close() error {
	if u.known == nil {
		return nil
	}
	return u.known.close()
}

// files returns what is known for containers of an image, and the name of the
// directory for it, "" if nothing is known.
func (u *imageUsers) files(chain string) (users.Files, string, error) {
	if u.known != nil {
		files, ok, err := u.known.get(chain)
		if err != nil {
			return users.Files{}, "", err
		}
		if ok {
			return files, directoryName(chain), nil
		}
	}
	if u.static != nil {
		return *u.static, staticUsers, nil
	}
	return users.Files{}, "", nil
}

func directoryName(chain string) string { return strings.ReplaceAll(chain, ":", "-") }

// directory returns the directory for containers of an image, or "" if nothing is
// known of its users. The container's snapshot has to be in the store already,
// or cleanup may remove the directory.
func (u *imageUsers) directory(chain string) (string, error) {
	files, name, err := u.files(chain)
	if err != nil {
		return "", fmt.Errorf("users of the image with chain ID %s: %w", chain, err)
	}
	if name == "" {
		return "", nil
	}
	dir := filepath.Join(u.root, name)
	u.mu.RLock()
	ok := hasFiles(dir, files)
	u.mu.RUnlock()
	if ok {
		return dir, nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	if hasFiles(dir, files) {
		return dir, nil
	}
	if err := makeDirectory(dir, files); err != nil {
		return "", fmt.Errorf("make a directory for the users of the image with chain ID %s: %w", chain, err)
	}
	return dir, nil
}

// hasFiles tells whether a directory is as it has to be. Comparing the content
// makes up for what a power failure can do to files that were never synced.
func hasFiles(dir string, files users.Files) bool {
	for name, want := range map[string][]byte{"passwd": files.Passwd, "group": files.Group} {
		got, err := os.ReadFile(filepath.Join(dir, "etc", name))
		if want == nil && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil || want == nil || !bytes.Equal(got, want) {
			return false
		}
	}
	info, err := os.Stat(filepath.Join(dir, "etc"))
	return err == nil && info.IsDir()
}

// stagePrefix marks a directory that is not complete yet.
const stagePrefix = "new-"

func makeDirectory(dir string, files users.Files) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	stage, err := os.MkdirTemp(filepath.Dir(dir), stagePrefix)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(stage))
		}
	}()
	// It becomes the root directory of a mount, as which any user may see it.
	if err := errors.Join(os.Chmod(stage, 0o755), os.Mkdir(filepath.Join(stage, "etc"), 0o755)); err != nil {
		return err
	}
	for name, content := range map[string][]byte{"passwd": files.Passwd, "group": files.Group} {
		if content == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(stage, "etc", name), content, 0o644); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	return os.Rename(stage, dir)
}

// cleanup removes the directories that no snapshot needs. walk lists the
// snapshots of the store.
func (u *imageUsers) cleanup(ctx context.Context, walk func(context.Context, snapshots.WalkFunc, ...string) error) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	entries, err := os.ReadDir(u.root)
	if errors.Is(err, fs.ErrNotExist) || (err == nil && len(entries) == 0) {
		return nil
	} else if err != nil {
		return fmt.Errorf("clean up the users of images: %w", err)
	}
	needed := map[string]bool{}
	err = walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if chain := chainID(info); chain != "" {
			needed[directoryName(chain)] = true
			needed[staticUsers] = u.static != nil
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("clean up the users of images: %w", err)
	}
	var errs []error
	for _, e := range entries {
		if !needed[e.Name()] {
			errs = append(errs, os.RemoveAll(filepath.Join(u.root, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// LayersPrepared reads the users and groups of an image that was left to the
// guest, unless they are known. That the image has none that can be used is not
// an error: containers that need them are told when they are created.
func (s *snapshotter) LayersPrepared(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest,
	fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error),
) error {
	return s.users.read(ctx, layers, diffIDs, fetch)
}

// NeedsLayers tells that the users of an image were not read yet: the option was
// set after the pull, or the store was lost. Without this, a container would have
// other IDs than the ones before it, and nobody would notice.
func (s *snapshotter) NeedsLayers(_ context.Context, chainID string) (bool, error) {
	if s.users.known == nil {
		return false, nil
	}
	found, err := s.users.known.has(chainID)
	return !found, err
}

func (u *imageUsers) read(ctx context.Context, descs []ocispec.Descriptor, diffIDs []digest.Digest, fetch users.Fetch) error {
	if u.known == nil || len(diffIDs) == 0 {
		return nil
	}
	chain := identity.ChainID(diffIDs).String()
	done, err := u.lock(ctx, chain)
	if err != nil {
		return err
	}
	defer done()
	if _, ok, err := u.known.get(chain); err != nil || ok {
		if ok {
			u.observe("known")
		}
		return err
	}

	if len(descs) != len(diffIDs) {
		return fmt.Errorf("users of the image with chain ID %s: there are %d layers and %d diff IDs: %w",
			chain, len(descs), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	layers := make([]users.Layer, len(descs))
	var size int64
	for i, desc := range descs {
		layers[i] = users.Layer{Descriptor: desc, DiffID: diffIDs[i]}
		size += desc.Size
	}

	start := time.Now()
	files, stats, err := users.Read(ctx, layers, fetch)
	logger := log.G(ctx).WithFields(log.Fields{
		"chainID": chain, "layers": len(layers), "layersRead": stats.Layers,
		"size": size, "bytesRead": stats.Bytes, "duration": time.Since(start).Round(time.Microsecond),
	})
	switch {
	case errdefs.IsFailedPrecondition(err):
		u.observe("unusable")
		logger.WithError(err).Warn("the users and groups of a guest-pulled image are not known to the host: " +
			"names do not work as its user, use numbers or list the names in the snapshotter's users")
		if err := u.known.putUnusable(chain, err.Error()); err != nil {
			return fmt.Errorf("keep that the users of the image with chain ID %s cannot be read: %w", chain, err)
		}
		return nil
	case err != nil:
		u.observe("failed")
		return fmt.Errorf("read the users and groups of the image with chain ID %s, as resolve_users = %q says: %w", chain, ResolveUsersRegistry, err)
	}
	if err := u.known.put(chain, files); err != nil {
		u.observe("failed")
		return fmt.Errorf("keep the users and groups of the image with chain ID %s: %w", chain, err)
	}
	u.observe("read")
	logger.Info("read the users and groups of a guest-pulled image")
	return nil
}

// lock makes sure that an image is read once, however often it is pulled at the
// same time.
func (u *imageUsers) lock(ctx context.Context, chain string) (unlock func(), _ error) {
	for {
		u.readMu.Lock()
		other, ok := u.reading[chain]
		if !ok {
			mine := make(chan struct{})
			u.reading[chain] = mine
			u.readMu.Unlock()
			return func() {
				u.readMu.Lock()
				delete(u.reading, chain)
				u.readMu.Unlock()
				close(mine)
			}, nil
		}
		u.readMu.Unlock()
		select {
		case <-other:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}
