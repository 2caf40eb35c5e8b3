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
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// layers measures what one image layer costs when all that there is to do is to
// believe that it exists.
func (b *bench) layers(ctx context.Context) error {
	b.begin("Layer preparation")
	ctx = namespace(ctx)
	for _, disk := range []struct {
		name   string
		unsafe bool
		rounds int
		target *target
	}{
		{"prepare one image layer", false, b.scale.layerRounds, atMost(1.05)},
		// What the disk costs hides what the calls cost.
		{"the same with containerd's no_sync", true, 2 * b.scale.layerRounds, nil},
	} {
		stores, closeAll, err := b.openContenders(ctx, disk.unsafe)
		if err != nil {
			return errors.Join(err, closeAll())
		}
		take := func(names ...string) (map[string]series, error) {
			var contenders []contender
			for _, name := range names {
				contenders = append(contenders, contender{name, func() (float64, error) {
					return stores[name].timeImage(ctx, name, "image", layersPerImage)
				}})
			}
			return interleave(ctx, disk.rounds, contenders...)
		}
		// Those that write more, and keep the disk busy, are on their own.
		r, err := take(guestPull, nothing, overProxy, atOnce)
		var heavy map[string]series
		if err == nil {
			heavy, err = take(guestPull, overlayfs, rowPerLayer)
		}
		if err := errors.Join(err, closeAll()); err != nil {
			return err
		}
		b.compare(disk.name, "the metadata store alone", "s", r[guestPull], r[nothing], disk.target)
		b.compareSubject(atOnce, disk.name, "one layer after the other", "s", r[atOnce], r[guestPull], nil)
		b.compareSubject(atOnce, disk.name, "guest-pull over a proxy socket", "s", r[atOnce], r[overProxy], nil)
		b.compare(disk.name, "guest-pull over a proxy socket", "s", r[guestPull], r[overProxy], nil)
		b.compare(disk.name, "overlayfs, layers empty", "s", heavy[guestPull], heavy[overlayfs], nil)
		b.compare(disk.name, "a snapshotter that keeps a row for each layer", "s", heavy[guestPull], heavy[rowPerLayer], nil)
		if disk.unsafe {
			// Where the disk does not drown it.
			b.compare("what the snapshotter adds to the metadata store", "what the proxy socket adds", "s",
				each(minus, r[guestPull], r[nothing]), each(minus, r[overProxy], r[nothing]), atMost(0.2))
		}
	}
	return b.writes(ctx)
}

// openContenders opens a metadata store over each backend.
func (b *bench) openContenders(ctx context.Context, unsafe bool) (map[string]*store, func() error, error) {
	stores := map[string]*store{}
	var closers []io.Closer
	closeAll := func() error {
		var errs []error
		for _, c := range closers {
			errs = append(errs, c.Close())
		}
		return errors.Join(errs...)
	}
	dir, err := os.MkdirTemp(b.dir, "layers-")
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, closer(func() error { return os.RemoveAll(dir) }))
	d, err := startDaemon(filepath.Join(dir, "daemon"))
	if err != nil {
		return nil, closeAll, err
	}
	closers = append(closers, closer(d.stop))
	for _, name := range []string{guestPull, nothing, overProxy, overlayfs, rowPerLayer, atOnce} {
		own := filepath.Join(dir, fmt.Sprint(len(stores)))
		var backend snapshots.Snapshotter
		if name == overProxy {
			backend, err = d.connect()
		} else {
			backend, err = openBackend(ctx, name, filepath.Join(own, "root"), false)
		}
		if err != nil {
			return nil, closeAll, err
		}
		s, err := openStore(ctx, own, backend, unsafe)
		if err != nil {
			return nil, closeAll, errors.Join(err, backend.Close())
		}
		stores[name] = s
		closers = append(closers, s)
	}
	return stores, closeAll, nil
}

type closer func() error

func (c closer) Close() error { return c() }

// writes counts what a snapshotter writes for each layer. bbolt numbers its
// transactions: each one writes pages and flushes them twice.
func (b *bench) writes(ctx context.Context) error {
	perLayer := map[string]float64{}
	var ofStore float64
	for _, name := range []string{guestPull, overlayfs, rowPerLayer} {
		dir, err := os.MkdirTemp(b.dir, "writes-")
		if err != nil {
			return err
		}
		root := filepath.Join(dir, "root")
		prepareImages := func(images int) error {
			backend, err := openBackend(ctx, name, root, false)
			if err != nil {
				return err
			}
			s, err := openStore(ctx, dir, backend, false)
			if err != nil {
				return errors.Join(err, backend.Close())
			}
			for i := range images {
				if err = prepare(ctx, s.sn, newImage(fmt.Sprintf("image-%d-%d", images, i), layersPerImage)); err != nil {
					break
				}
			}
			return errors.Join(err, s.Close())
		}
		count := func(images int) (own, store int, err error) {
			if err := prepareImages(images); err != nil {
				return 0, 0, err
			}
			own, err = harness.Transactions(filepath.Join(root, "metadata.db"))
			if err != nil {
				return 0, 0, err
			}
			store, err = harness.Transactions(filepath.Join(dir, "meta.db"))
			return own, store, err
		}
		// The databases are made, opened without doing anything, and used.
		const images = 3
		var own, store []int
		for _, n := range []int{1, 0, images} {
			o, s, err := count(n)
			if err != nil {
				return err
			}
			own, store = append(own, o), append(store, s)
		}
		used := func(c []int) float64 {
			opening := c[1] - c[0]
			return float64(c[2]-c[1]-opening) / (images * layersPerImage)
		}
		perLayer[name], ofStore = used(own), used(store)
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		if name == guestPull {
			if err := prepareSealed(filepath.Join(dir, "sealed")); err != nil {
				return err
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			b.compare("transactions of the metadata store for each layer", "one", "transactions", series{ofStore}, series{1}, nil)
		}
	}
	const what = "fsyncs by the snapshotter for each layer"
	b.compare(what, "overlayfs", "fsyncs", series{2 * perLayer[guestPull]}, series{2 * perLayer[overlayfs]}, exactly(0, "fsyncs"))
	b.compare(what, "a snapshotter that keeps a row for each layer", "fsyncs",
		series{2 * perLayer[guestPull]}, series{2 * perLayer[rowPerLayer]}, exactly(0, "fsyncs"))
	return nil
}

// growth measures how layer preparation slows down as a node fills.
func (b *bench) growth(ctx context.Context) error {
	b.begin("A node that fills")
	ctx = namespace(ctx)
	for _, g := range []struct {
		what, backend, subject, curve string
		// fill puts n snapshots on the node whose files are below dir.
		fill   func(ctx context.Context, dir string, n int) error
		layers int // in a sample
		rounds int
		target *target
	}{
		{
			"prepare a layer, with %d layers in the metadata store", guestPull, guestPull, "guest-pull, filled with layers",
			func(ctx context.Context, dir string, n int) error { return fillStore(ctx, dir, n) },
			layersPerImage, b.scale.growthRounds, atMost(1.1),
		},
		{
			"prepare a layer, with %d containers in the plugin's store", guestPull, guestPull, "guest-pull, filled with containers",
			func(ctx context.Context, dir string, n int) error {
				return fillRows(ctx, filepath.Join(dir, "root", "metadata.db"), n, snapshots.KindActive)
			},
			layersPerImage, b.scale.growthRounds, atMost(1.1),
		},
		{
			"prepare a layer, with %d layers in the metadata store", atOnce, atOnce, "guest-pull, all layers at once, filled with layers",
			func(ctx context.Context, dir string, n int) error { return fillStore(ctx, dir, n) },
			layersPerImage, b.scale.growthRounds, nil,
		},
		{
			"prepare a layer, with %d layers in the metadata store", nothing, "the metadata store alone", "the metadata store alone, filled with layers",
			func(ctx context.Context, dir string, n int) error { return fillStore(ctx, dir, n) },
			layersPerImage, b.scale.growthRounds, nil,
		},
		{
			"prepare a layer, with %d rows in its store", rowPerLayer, "a row for each layer", "a snapshotter that keeps a row for each layer",
			func(ctx context.Context, dir string, n int) error {
				return fillRows(ctx, filepath.Join(dir, "root", "metadata.db"), n, snapshots.KindCommitted)
			},
			1, b.scale.growthRounds, nil,
		},
	} {
		if err := b.grow(ctx, g.what, g.backend, g.subject, g.curve, g.fill, g.layers, g.rounds, g.target); err != nil {
			return err
		}
	}
	return b.writesOfGrowth(ctx)
}

// writesOfGrowth counts what the times of growth are made of. In a database of more
// snapshots, a change is further from the root, and so more pages are written anew.
// The snapshotter adds none.
func (b *bench) writesOfGrowth(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp(b.dir, "growth-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	count := func(kind, filled string) (_ float64, err error) {
		own := filepath.Join(filled, kind)
		if err := os.CopyFS(filepath.Join(own, "store"), os.DirFS(filepath.Join(filled, "store"))); err != nil {
			return 0, err
		}
		backend, err := openBackend(ctx, kind, filepath.Join(own, "root"), true)
		if err != nil {
			return 0, err
		}
		s, err := openStore(ctx, filepath.Join(own, "store"), backend, true)
		if err != nil {
			return 0, errors.Join(err, backend.Close())
		}
		defer func() { err = errors.Join(err, s.Close(), os.RemoveAll(own)) }()
		return s.countWrites(ctx, layersPerImage)
	}
	sizes := []int{b.scale.growth[0], b.scale.growth[len(b.scale.growth)-1]}
	var ours, alone []float64
	for _, n := range sizes {
		filled := filepath.Join(dir, fmt.Sprint(n))
		if err := fillStore(ctx, filepath.Join(filled, "store"), n); err != nil {
			return err
		}
		for kind, counts := range map[string]*[]float64{guestPull: &ours, nothing: &alone} {
			writes, err := count(kind, filled)
			if err != nil {
				return fmt.Errorf("%s, with %d layers: %w", kind, n, err)
			}
			*counts = append(*counts, writes)
		}
	}
	what := fmt.Sprintf("writes to containerd's database for a layer, with %d layers there", sizes[1])
	b.compare(what, fmt.Sprintf("itself with %d", sizes[0]), "writes", series{ours[1]}, series{ours[0]}, nil)
	b.compare(what, "the metadata store alone, with as many", "writes", series{ours[1]}, series{alone[1]}, equal())
	return nil
}

func (b *bench) grow(ctx context.Context, what, kind, subject, name string, fill func(context.Context, string, int) error, layers, rounds int, t *target) (err error) {
	dir, err := os.MkdirTemp(b.dir, "growth-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	var contenders []contender
	for _, n := range b.scale.growth {
		name := fmt.Sprintf(what, n)
		b.log("  filling: %s (%s)", name, subject)
		own := filepath.Join(dir, fmt.Sprint(n))
		if err := os.MkdirAll(filepath.Join(own, "root"), 0o700); err != nil {
			return err
		}
		if err := fill(ctx, own, n); err != nil {
			return err
		}
		backend, err := openBackend(ctx, kind, filepath.Join(own, "root"), false)
		if err != nil {
			return err
		}
		s, err := openStore(ctx, own, backend, false)
		if err != nil {
			return errors.Join(err, backend.Close())
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		contenders = append(contenders, contender{name, func() (float64, error) {
			return s.timeImage(ctx, kind, "image", layers)
		}})
	}
	r, err := interleave(ctx, rounds, contenders...)
	if err != nil {
		return err
	}
	first := r[contenders[0].name]
	c := curve{Picture: growthPicture, Name: name}
	for i, n := range b.scale.growth {
		v := r[contenders[i].name]
		c.Points = append(c.Points, point{X: float64(n), Ratio: summarize(each(over, v, first))})
		if i > 0 {
			b.compareSubject(subject, contenders[i].name, fmt.Sprintf("itself with %d", b.scale.growth[0]), "s", v, first, t)
		}
	}
	b.Curves = append(b.Curves, c)
	return nil
}

// fillStore fills a metadata store with the names of images.
func fillStore(ctx context.Context, dir string, n int) error {
	s, err := openStore(ctx, dir, noBackend{}, true)
	if err != nil {
		return err
	}
	return errors.Join(s.fill(ctx, "filler", n), s.Close())
}
