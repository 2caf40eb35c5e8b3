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
	"maps"
	"path/filepath"
	"runtime"
	"slices"

	containerdimages "github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/metadata/boltutil"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// full measures a node that has as many images and containers as a node may have, and
// stock containerd with as many: what kubelet asks of it all the time, and its start.
// The containers run in a guest that does nothing, here and there: what a shim takes for
// an answer is not containerd's.
func (b *bench) full(ctx context.Context) (err error) {
	b.begin("A full node")
	nodes := []*node{
		{name: guestPull, binary: b.binaries.ours, handler: harness.Guest, snapshotter: guestPull},
		{name: stockNode, binary: b.binaries.stock, handler: harness.Guest, snapshotter: overlayfs},
	}
	for _, n := range nodes {
		o := harness.Options{Registry: b.reg, Binaries: n.binary, ExtraConfig: quiet + noSync, Guest: guest.Config{Idle: true}}
		if n.name == stockNode {
			o.GuestSnapshotter = overlayfs // it has no other
		}
		if n.harness, err = harness.Start(ctx, o); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, n.harness.Close()) }()
		b.log("  filling: %s", n.name)
		if err := n.harness.Down(); err != nil {
			return err
		}
		if err := n.fillImages(ctx, b.scale.fullImages); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
		if err := n.harness.Up(ctx); err != nil {
			return err
		}
		if err := b.runMany(ctx, n, b.scale.fullContainers); err != nil {
			return fmt.Errorf("%s: %w", n.name, err)
		}
	}
	with := fmt.Sprintf(", with %d images of %d layers and %d containers", b.scale.fullImages, layersPerImage, b.scale.fullContainers)
	calls := b.kubeletCalls()
	for _, what := range slices.Sorted(maps.Keys(calls)) {
		call := calls[what]
		var contenders []contender
		for _, n := range nodes {
			contenders = append(contenders, contender{n.name, func() (float64, error) {
				return timed(func() error { return call(ctx, n.harness) })
			}})
		}
		r, err := interleave(ctx, b.scale.callRounds, contenders...)
		if err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		b.compare(what+with, stockNode+" with as many", "s", r[guestPull], r[stockNode], atMost(1.1))
	}

	for _, n := range nodes {
		if err := n.harness.Down(); err != nil {
			return err
		}
	}
	start, _, err := b.startAndStop(ctx, nodes)
	if err != nil {
		return err
	}
	b.compare("start of containerd, until it answers CRI"+with, stockNode+" with as many", "s", start[guestPull], start[stockNode], atMost(1.05))
	for _, n := range nodes {
		// So that the pods are removed as they should.
		if err := n.harness.Up(ctx); err != nil {
			return err
		}
	}
	return nil
}

// kubeletCalls are the calls that kubelet makes again and again. Each fails if what it
// is about is not there.
func (b *bench) kubeletCalls() map[string]func(context.Context, *harness.Node) error {
	atLeast := func(what string, n, want int, err error) error {
		if err == nil && n < want {
			err = fmt.Errorf("%d %s, not %d", n, what, want)
		}
		return err
	}
	return map[string]func(context.Context, *harness.Node) error{
		"ListImages": func(ctx context.Context, n *harness.Node) error {
			r, err := n.Images.ListImages(ctx, &runtimeapi.ListImagesRequest{})
			return atLeast("images", len(r.GetImages()), b.scale.fullImages, err)
		},
		"ImageStatus, 20 times": func(ctx context.Context, n *harness.Node) error {
			for i := range 20 {
				s, err := n.ImageStatus(ctx, fullImageName(i*b.scale.fullImages/20))
				if err == nil && s == nil {
					err = errors.New("an image is absent")
				}
				if err != nil {
					return err
				}
			}
			return nil
		},
		"ImageFsInfo": func(ctx context.Context, n *harness.Node) error {
			r, err := n.Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
			return atLeast("file systems", len(r.GetImageFilesystems()), 1, err)
		},
		"ListContainerStats": func(ctx context.Context, n *harness.Node) error {
			r, err := n.Runtime.ListContainerStats(ctx, &runtimeapi.ListContainerStatsRequest{})
			return atLeast("containers", len(r.GetStats()), b.scale.fullContainers, err)
		},
		"ListPodSandboxStats": func(ctx context.Context, n *harness.Node) error {
			r, err := n.Runtime.ListPodSandboxStats(ctx, &runtimeapi.ListPodSandboxStatsRequest{})
			return atLeast("pods", len(r.GetStats()), (b.scale.fullContainers+perPod-1)/perPod, err)
		},
	}
}

// perPod is how many containers the pods of a full node have.
const perPod = 10

// runMany runs pods of many containers, of one image.
func (b *bench) runMany(ctx context.Context, n *node, containers int) error {
	img, err := images.Build(images.Spec{Name: "many", Layers: 2, LayerSize: 1 << 10})
	if err != nil {
		return err
	}
	ref, err := b.reg.Push("many:1", img)
	if err != nil {
		return err
	}
	for done := 0; done < containers; done += perPod {
		pod, err := n.harness.RunPod(ctx, harness.PodSpec{Handler: n.handler})
		if err == nil {
			err = pod.MakeCgroup()
		}
		if err != nil {
			return err
		}
		for range min(perPod, containers-done) {
			if _, err := pod.Run(ctx, harness.ContainerSpec{Image: ref}); err != nil {
				return err
			}
		}
	}
	return nil
}

func fullImageName(i int) string { return fmt.Sprintf("registry.example/full-%d:1", i) }

// fillImages gives a node that is down images as pulls leave them: three names for each,
// as CRI keeps them, manifest and config, and the snapshots of the layers. Of a stock
// node's layers the compressed content is not kept, as with discard_unpacked_layers,
// and the snapshots are empty.
func (n *node) fillImages(ctx context.Context, many int) (err error) {
	ctx = namespace(ctx)
	backend, err := openBackend(ctx, n.snapshotter, n.harness.SnapshotterRoot(n.snapshotter), true)
	if err != nil {
		return err
	}
	s, err := openMetadata(ctx, metadataFiles{
		db:      filepath.Join(n.harness.Root(), "io.containerd.metadata.v1.bolt", "meta.db"),
		content: filepath.Join(n.harness.Root(), "io.containerd.content.v1.content"),
	}, n.snapshotter, backend, true)
	if err != nil {
		return errors.Join(err, backend.Close())
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	store := metadata.NewImageStore(s.DB)
	for i := range many {
		layers := newImage(fmt.Sprintf("full-%d", i), layersPerImage)
		config := newBlob(ocispec.MediaTypeImageConfig, ocispec.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
			Config:   ocispec.ImageConfig{Cmd: []string{"/app"}},
			RootFS:   ocispec.RootFS{Type: "layers", DiffIDs: layers.diffIDs},
		})
		config.labels = map[string]string{"containerd.io/gc.ref.snapshot." + n.snapshotter: layers.top()}
		m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: config.desc}
		for l := range layers.chain {
			m.Layers = append(m.Layers, ocispec.Descriptor{
				MediaType: ocispec.MediaTypeImageLayerGzip,
				Digest:    digest.FromString(fmt.Sprintf("layer %d of %d", l, i)),
				Size:      4 << 20,
			})
		}
		manifest := newBlob(ocispec.MediaTypeImageManifest, m)
		manifest.labels = map[string]string{"containerd.io/gc.ref.content.config": config.desc.Digest.String()}
		for _, blob := range []blob{config, manifest} {
			if err := blob.write(ctx, s.ContentStore()); err != nil {
				return err
			}
		}
		if err := prepare(ctx, s.sn, layers); err != nil {
			return err
		}
		err := s.Update(func(tx *bolt.Tx) error {
			ctx := boltutil.WithTransaction(ctx, tx)
			for _, name := range []string{
				fullImageName(i), fmt.Sprintf("registry.example/full-%d@%s", i, manifest.desc.Digest), config.desc.Digest.String(),
			} {
				if _, err := store.Create(ctx, containerdimages.Image{
					Name: name, Target: manifest.desc, Labels: map[string]string{"io.cri-containerd.image": "managed"},
				}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}
