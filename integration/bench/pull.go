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
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// remoteImage is an image in the registry.
type remoteImage struct {
	v1.Image
	name, ref string
	layers    int
}

func (b *bench) push(layers int) (remoteImage, error) {
	return b.pushAs(fmt.Sprintf("layers-%d", layers), layers)
}

// pushHost pushes an image for pods on the host, where one for guests has to be alone:
// of an image that is on the host, containerd looks into it for the guest's users.
func (b *bench) pushHost(layers int) (remoteImage, error) {
	return b.pushAs(fmt.Sprintf("host-%d", layers), layers)
}

func (b *bench) pushAs(name string, layers int) (remoteImage, error) {
	i := remoteImage{name: name, layers: layers}
	img, err := images.Build(images.Spec{Name: i.name, Layers: layers, LayerSize: b.scale.layerSize})
	if err != nil {
		return i, err
	}
	i.Image = img
	i.ref, err = b.reg.Push(i.name+":1", img)
	return i, err
}

// pulls measures pulls over CRI.
func (b *bench) pulls(ctx context.Context) error {
	b.begin("Pull over CRI, from a registry on this machine")
	floor, err := openStore(namespace(ctx), filepath.Join(b.dir, "pull"), noBackend{}, false)
	if err != nil {
		return err
	}
	defer floor.Close()

	ours := curve{Picture: pullPicture, Name: guestPull}
	theirs := curve{Picture: pullPicture, Name: overlayfs}
	for _, layers := range b.scale.pulls {
		b.log("  %s", plural(layers))
		img, err := b.push(layers)
		if err != nil {
			return err
		}
		size, err := images.LayersSize(img)
		if err != nil {
			return err
		}
		r, err := interleave(ctx, b.scale.pullRounds,
			contender{guestPull, func() (float64, error) { return b.timePull(ctx, img, harness.Guest) }},
			contender{overlayfs, func() (float64, error) { return b.timePull(ctx, img, harness.Runc) }},
			contender{"http", func() (float64, error) { return timed(func() error { return fetch(ctx, b.reg.URL(), img) }) }},
			contender{nothing, func() (float64, error) {
				perLayer, err := floor.timeImage(namespace(ctx), nothing, img.name, layers)
				return perLayer * float64(layers), err
			}},
		)
		if err != nil {
			return err
		}
		what := fmt.Sprintf("pull an image of %s, %.0f MiB", plural(layers), float64(size)/(1<<20))
		b.compare(what, "overlayfs on the same containerd", "s", r[guestPull], r[overlayfs], nil)
		t := map[int]*target{1: atMost(4), 5: atMost(2.5), 60: atMost(1.5)}[layers]
		b.compare(what, "plain HTTP fetch of manifest and config, plus the metadata store alone, layer by layer", "s",
			r[guestPull], each(sum, r["http"], r[nothing]), t)
		ours.Points = append(ours.Points, point{float64(layers), summarize(each(over, r[guestPull], r["http"]))})
		theirs.Points = append(theirs.Points, point{float64(layers), summarize(each(over, r[overlayfs], r["http"]))})
		if err := b.traffic(ctx, img); err != nil {
			return err
		}
		if layers >= layersPerImage {
			if err := b.records(ctx, img); err != nil {
				return err
			}
		}
	}
	b.Curves = append(b.Curves, ours, theirs)
	return nil
}

func plural(layers int) string {
	if layers == 1 {
		return "1 layer"
	}
	return fmt.Sprintf("%d layers", layers)
}

// timePull measures a pull of an image that the node does not have, and removes
// the image.
func (b *bench) timePull(ctx context.Context, img remoteImage, handler string) (float64, error) {
	took, err := timed(func() error {
		_, err := b.node.Pull(ctx, harness.PullSpec{Image: img.ref, Handler: handler, Hint: harness.HintImageSpec})
		return err
	})
	if err != nil {
		return 0, err
	}
	return took, b.forget(ctx, img)
}

func (b *bench) forget(ctx context.Context, img remoteImage) error {
	return errors.Join(b.node.RemoveImage(ctx, img.ref), b.node.GC(ctx))
}

// fetch is the least that a pull has to do: get the manifest and the config, on a
// new connection.
func fetch(ctx context.Context, base string, img remoteImage) error {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	config, err := img.ConfigName()
	if err != nil {
		return err
	}
	for _, path := range []string{"manifests/1", "blobs/" + config.String()} {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/v2/"+img.name+"/"+path, nil)
		if err != nil {
			return err
		}
		resp, err := transport.RoundTrip(req)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, resp.Body)
		if err := errors.Join(err, resp.Body.Close()); err != nil {
			return err
		}
		if resp.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", req.URL, resp.Status)
		}
	}
	return nil
}

// traffic counts what a pull takes from the registry.
func (b *bench) traffic(ctx context.Context, img remoteImage) error {
	manifest, err := img.RawManifest()
	if err != nil {
		return err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return err
	}
	b.reg.Reset()
	if _, err := b.timePull(ctx, img, harness.Guest); err != nil {
		return err
	}
	log := b.reg.Log().By(registry.Host).In(img.name)
	bytes, err := float64(log.OK().Bytes()), b.noLayers()
	if err != nil {
		return err
	}
	what := fmt.Sprintf("bytes from the registry for %s", plural(img.layers))
	b.compare(what, "manifest and config", "B", series{bytes}, series{float64(len(manifest) + len(config))}, equal())
	gets := log.Where(func(q registry.Request) bool { return q.Method == http.MethodGet })
	b.compare(fmt.Sprintf("GET requests for %s", plural(img.layers)), "manifest and config", "requests",
		series{float64(len(gets))}, series{2}, equal())
	// Which says what the tag stands for.
	b.compare(fmt.Sprintf("all requests for %s", plural(img.layers)), "manifest and config", "requests",
		series{float64(len(log))}, series{2}, nil)
	return nil
}

// records measures what containerd's database keeps of each layer of an image: the bytes
// of all keys and values.
func (b *bench) records(ctx context.Context, img remoteImage) error {
	perLayer := map[string]float64{}
	for snapshotter, handler := range map[string]string{guestPull: harness.Guest, overlayfs: harness.Runc} {
		if _, err := b.node.Pull(ctx, harness.PullSpec{Image: img.ref, Handler: handler, Hint: harness.HintImageSpec}); err != nil {
			return err
		}
		if err := b.node.GC(ctx); err != nil { // containerd writes nothing after that
			return err
		}
		size, layers, err := b.recorded(snapshotter)
		if err := errors.Join(err, b.forget(ctx, img)); err != nil {
			return err
		}
		if layers != img.layers {
			return fmt.Errorf("containerd has recorded %d layers for %s, not %d", layers, snapshotter, img.layers)
		}
		perLayer[snapshotter] = size / float64(layers)
	}
	b.compare(fmt.Sprintf("record of a layer in containerd's database, image of %s", plural(img.layers)), "overlayfs on the same containerd", "B",
		series{perLayer[guestPull]}, series{perLayer[overlayfs]}, atMost(1))
	return nil
}

// recorded returns the bytes and the number of the snapshots that are recorded for a
// snapshotter, in a copy of the database, as containerd has it open.
func (b *bench) recorded(snapshotter string) (bytes float64, snapshots int, err error) {
	data, err := os.ReadFile(filepath.Join(b.node.Root(), "io.containerd.metadata.v1.bolt", "meta.db"))
	if err != nil {
		return 0, 0, err
	}
	path := filepath.Join(b.dir, "recorded.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		return 0, 0, err
	}
	db, err := bolt.Open(path, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		return 0, 0, err
	}
	defer func() { err = errors.Join(err, db.Close(), os.Remove(path)) }()
	var size func(*bolt.Bucket) error
	size = func(bkt *bolt.Bucket) error {
		return bkt.ForEach(func(k, v []byte) error {
			bytes += float64(len(k) + len(v))
			if v == nil {
				return size(bkt.Bucket(k))
			}
			return nil
		})
	}
	err = db.View(func(tx *bolt.Tx) error {
		bkt := tx.Bucket([]byte("v1"))
		for _, name := range []string{harness.CRINamespace, "snapshots", snapshotter} {
			if bkt == nil {
				break
			}
			bkt = bkt.Bucket([]byte(name))
		}
		if bkt == nil {
			return nil
		}
		if err := bkt.ForEachBucket(func([]byte) error {
			snapshots++
			return nil
		}); err != nil {
			return err
		}
		return size(bkt)
	})
	return bytes, snapshots, err
}

// noLayers fails if the host asked for a layer.
func (b *bench) noLayers() error {
	if layers := b.reg.Log().By(registry.Host).Of(registry.Layer); len(layers) > 0 {
		return fmt.Errorf("guest-pull fetched layers on the host:\n%s", layers)
	}
	return nil
}

// usage is what a node has on disk. containerd's databases are left out: they
// grow in steps, by doubling.
type usage struct{ bytes, inodes float64 }

func (b *bench) usage() (u usage, err error) {
	err = filepath.WalkDir(b.node.Root(), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || strings.HasSuffix(path, ".db") {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok {
			return fmt.Errorf("%s: no inode", path)
		}
		u.bytes += float64(st.Blocks) * 512
		u.inodes++
		return nil
	})
	return u, err
}

// added returns what f adds to the node's disk.
func (b *bench) added(ctx context.Context, f func() error) (usage, error) {
	// What was removed before goes away first.
	if err := b.node.GC(ctx); err != nil {
		return usage{}, err
	}
	before, err := b.usage()
	if err != nil {
		return usage{}, err
	}
	if err := f(); err != nil {
		return usage{}, err
	}
	after, err := b.usage()
	return usage{after.bytes - before.bytes, after.inodes - before.inodes}, err
}

func (b *bench) compareUsage(what string, ours, theirs usage, t *target) {
	b.compare("disk space of "+what, overlayfs, "B", series{ours.bytes}, series{theirs.bytes}, t)
	b.compare("inodes of "+what, overlayfs, "inodes", series{ours.inodes}, series{theirs.inodes}, t)
}
