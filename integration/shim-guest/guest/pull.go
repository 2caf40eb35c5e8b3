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
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"golang.org/x/sys/unix"
)

// UserAgent is how the guest's requests begin their User-Agent header, by which
// a registry's log can tell the guest from the host.
const UserAgent = "guest-pull-stand-in-guest/1"

// Image is an image in the guest.
type Image struct {
	// Name is the name that was asked for.
	Name string `json:"name"`
	// Digest is that of the manifest for the guest's platform.
	Digest string `json:"digest"`
	// ChainID is that of the layers that were unpacked; empty without layers.
	ChainID string `json:"chain_id"`
	// Layers are those of the manifest, the lowest first.
	Layers []Layer `json:"layers"`
	// Reused says that another container of the pod had brought the image, so
	// that no layer was fetched.
	Reused bool `json:"reused"`

	root string
}

// Layer is a layer as it is in the registry.
type Layer struct {
	Digest    string `json:"digest"`
	MediaType string `json:"media_type"`
	Size      int64  `json:"size"`
}

// store holds the images of one guest, each unpacked into one directory that
// only ever is a lower directory.
type store struct {
	dir    string
	turn   chan struct{} // one pull at a time
	images map[string]Image
}

func newStore(dir string) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	return &store{dir: dir, turn: make(chan struct{}, 1), images: map[string]Image{}}, nil
}

// expected is what the host said of an image; what it did not is empty.
type expected struct {
	manifest string // its digest
	size     string // of its layers, in bytes
}

// fits says, before anything is fetched, that there is no space for what will be: the
// layers take at least their compressed size.
func (e expected) fits(dir string) error {
	if e.size == "" {
		return nil
	}
	size, err := strconv.ParseUint(e.size, 10, 63)
	if err != nil {
		return fmt.Errorf("the size of its layers by the host: %w: %w", errdefs.ErrInvalidArgument, err)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	if free := fs.Bavail * uint64(fs.Bsize); size > free {
		return fmt.Errorf("%w: its layers have %d bytes, and the guest has space for %d", errdefs.ErrResourceExhausted, size, free)
	}
	return nil
}

// pull returns the image of that name for the guest's platform. It asks the
// registry each time for what the name stands for, and fetches the layers of an
// image once. The caller's context and Config.PullTimeout bound it.
func (s *store) pull(ctx context.Context, cfg Config, conf *cdh, imageName string, want expected) (Image, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, time.Duration(cfg.PullTimeout),
		fmt.Errorf("not done within pull_timeout, %v: %w", time.Duration(cfg.PullTimeout), context.DeadlineExceeded))
	defer cancel()

	img, err := s.pullImage(ctx, cfg, conf, imageName, want)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		return Image{}, fmt.Errorf("pull image %q in the guest: %w", imageName, err)
	}
	return img, nil
}

func (s *store) pullImage(ctx context.Context, cfg Config, conf *cdh, imageName string, want expected) (Image, error) {
	if cfg.IgnoreChainID {
		want.manifest = "" // the chain ID is logged
	}
	select {
	case s.turn <- struct{}{}:
		defer func() { <-s.turn }()
	case <-ctx.Done():
		return Image{}, ctx.Err()
	}
	if conf != nil {
		tasks, err := conf.tasks(imageName)
		if err != nil {
			return Image{}, err
		}
		return tryAll(tasks, imageName, func(t pullTask) (Image, error) {
			ref, err := name.ParseReference(t.reference)
			if err != nil {
				return Image{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
			}
			base := http.DefaultTransport.(*http.Transport).Clone()
			base.TLSClientConfig = &tls.Config{}
			defer base.CloseIdleConnections()
			return s.pullFrom(ctx, imageName, want, ref, conf.transport(t, base), authn.Anonymous)
		})
	}

	ref, err := name.ParseReference(imageName)
	if err != nil {
		return Image{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
	}
	registry := cfg.Registries[ref.Context().RegistryStr()]
	if registry.PlainHTTP {
		if ref, err = name.ParseReference(imageName, name.Insecure); err != nil {
			return Image{}, fmt.Errorf("%w: %w", errdefs.ErrInvalidArgument, err)
		}
	}
	transport, err := newTransport(cfg)
	if err != nil {
		return Image{}, err
	}
	defer transport.CloseIdleConnections()

	auth := authn.Anonymous
	if registry.Username != "" {
		auth = &authn.Basic{Username: registry.Username, Password: registry.Password}
	}
	return s.pullFrom(ctx, imageName, want, ref, transport, auth)
}

// pullFrom pulls the image of a name from one place.
func (s *store) pullFrom(ctx context.Context, imageName string, want expected, ref name.Reference, transport http.RoundTripper, auth authn.Authenticator) (Image, error) {
	remoteImage, err := remote.Image(ref,
		remote.WithContext(ctx),
		remote.WithTransport(transport),
		remote.WithAuth(auth),
		remote.WithUserAgent(UserAgent),
		remote.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}),
	)
	if err != nil {
		return Image{}, err
	}
	dgst, err := remoteImage.Digest()
	if err != nil {
		return Image{}, err
	}
	if want.manifest != "" && want.manifest != dgst.String() {
		return Image{}, fmt.Errorf("%w: the manifest of image %q is %s in the guest, the host resolved %s",
			errdefs.ErrFailedPrecondition, imageName, dgst, want.manifest)
	}
	if img, ok := s.images[dgst.String()]; ok {
		img.Name = imageName
		img.Reused = true
		return img, nil
	}

	if err := want.fits(s.dir); err != nil {
		return Image{}, fmt.Errorf("image %q: %w", imageName, err)
	}

	// A half unpacked image never gets the name of a whole one.
	tmp, err := os.MkdirTemp(s.dir, "new-")
	if err != nil {
		return Image{}, err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return Image{}, err
	}
	img, err := unpack(ctx, remoteImage, tmp)
	if err != nil {
		return Image{}, err
	}
	img.Name = imageName
	img.Digest = dgst.String()
	img.root = filepath.Join(s.dir, dgst.Hex)
	if err := os.Rename(tmp, img.root); err != nil {
		return Image{}, err
	}
	s.images[img.Digest] = img
	return img, nil
}

// unpack applies the layers of an image to an empty directory. Every layer is
// checked against its digest, and its contents against the image's
// configuration.
func unpack(ctx context.Context, image v1.Image, root string) (Image, error) {
	manifest, err := image.Manifest()
	if err != nil {
		return Image{}, fmt.Errorf("read the manifest: %w", err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		return Image{}, fmt.Errorf("read the image's configuration: %w", err)
	}
	if len(manifest.Layers) != len(config.RootFS.DiffIDs) {
		return Image{}, fmt.Errorf("the manifest has %d layers and the configuration %d", len(manifest.Layers), len(config.RootFS.DiffIDs))
	}
	var (
		img   = Image{Layers: []Layer{}}
		chain []digest.Digest
	)
	for _, desc := range manifest.Layers {
		if strings.HasSuffix(string(desc.MediaType), "+encrypted") {
			return Image{}, fmt.Errorf("layer %s is encrypted (%s) and the stand-in guest has no keys", desc.Digest, desc.MediaType)
		}
		img.Layers = append(img.Layers, Layer{Digest: desc.Digest.String(), MediaType: string(desc.MediaType), Size: desc.Size})
	}
	for i, desc := range manifest.Layers {
		layer, err := image.LayerByDigest(desc.Digest)
		if err != nil {
			return Image{}, fmt.Errorf("layer %s: %w", desc.Digest, err)
		}
		got, err := apply(ctx, layer, root)
		if err != nil {
			return Image{}, fmt.Errorf("unpack layer %s: %w", desc.Digest, err)
		}
		if want := config.RootFS.DiffIDs[i]; got != want {
			return Image{}, fmt.Errorf("layer %s unpacks to %s, the image's configuration says %s", desc.Digest, got, want)
		}
		chain = append(chain, digest.Digest(got.String()))
	}
	img.ChainID = identity.ChainID(chain).String()
	return img, nil
}

// apply unpacks one layer and returns the digest of what it unpacked.
func apply(ctx context.Context, layer v1.Layer, root string) (v1.Hash, error) {
	// gzip, zstd or neither, by the first bytes, and in process: the shim's
	// reaper would take the exit status of a helper program away.
	rc, err := layer.Uncompressed()
	if err != nil {
		return v1.Hash{}, err
	}
	defer rc.Close()
	hash := sha256.New()
	r := io.TeeReader(rc, hash)
	if _, err := archive.Apply(ctx, root, r); err != nil {
		return v1.Hash{}, err
	}
	// The padding after the end of the archive is part of the digest.
	if _, err := io.Copy(io.Discard, r); err != nil {
		return v1.Hash{}, err
	}
	return v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}, nil
}

func newTransport(cfg Config) (*http.Transport, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	if cfg.CAFile == "" {
		return t, nil
	}
	pem, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, fmt.Errorf("read ca_file: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("read the system's certificates: %w", err)
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%w: ca_file %s has no certificate", errdefs.ErrInvalidArgument, cfg.CAFile)
	}
	t.TLSClientConfig = &tls.Config{RootCAs: pool}
	return t, nil
}
