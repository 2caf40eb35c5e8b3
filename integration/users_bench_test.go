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

package integration_test

import (
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// BenchmarkPullWithUsers pulls images on a node that reads users from the registry
// and on one that does not, in turn, and reports what that adds: the time of a
// pull, and the bytes of layers that the host reads, of those that the image has.
// Where the users are in an image decides what is read.
//
//	go test -run '^$' -bench PullWithUsers -benchtime 10x .
func BenchmarkPullWithUsers(b *testing.B) {
	const layers, layerSize = 20, 5 << 20 // 100 MB
	users := text("etc/passwd", somePasswd, "etc/group", someGroup)
	var small [][]images.File
	for range 3 {
		small = append(small, text("srv/app", "an application on top of its user"))
	}
	for _, shape := range []struct {
		name string
		spec images.Spec
	}{
		// A user that was added next to last, and the application after it.
		{"added late", images.Spec{Top: append([][]images.File{users}, small...)}},
		{"in the top layer", images.Spec{Top: [][]images.File{users}}},
		// The worst case: every layer is read, down to the base.
		{"in the base layer", images.Spec{}},
		{"in the base layer, zstd", images.Spec{Encoding: images.Zstd}},
		{"in the base layer, uncompressed", images.Spec{Encoding: images.Uncompressed}},
		{"not there", images.Spec{NoUsers: true}},
	} {
		b.Run(shape.name, func(b *testing.B) {
			reg, err := registry.Start()
			require.NoError(b, err)
			defer reg.Close()
			off := harness.New(b, harness.Options{Registry: reg})
			on := harness.New(b, harness.Options{Registry: reg, PluginConfig: resolveUsers})
			if !hasPatch(on, "0008") {
				b.Skip("this containerd does not let a snapshotter look into layers: it was built without patch 0008")
			}
			spec := shape.spec
			spec.Name, spec.Layers, spec.LayerSize = "app", layers, layerSize
			img, err := images.Build(spec)
			require.NoError(b, err)
			ref, err := reg.Push("app:1", img)
			require.NoError(b, err)
			size, err := images.LayersSize(img)
			require.NoError(b, err)

			pull := func(n *harness.Node) time.Duration {
				start := time.Now()
				_, err := n.Pull(b.Context(), harness.PullSpec{Image: ref, Handler: harness.Guest, Hint: harness.HintImageSpec})
				took := time.Since(start)
				require.NoError(b, err)
				require.NoError(b, n.RemoveImage(b.Context(), ref))
				require.NoError(b, n.GC(b.Context()))
				return took
			}
			pull(off)
			pull(on)
			reg.Reset()
			var without, with time.Duration
			for b.Loop() {
				without += pull(off)
				with += pull(on)
			}
			per := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 / float64(b.N) }
			read := float64(reg.Log().By(registry.Host).Of(registry.Layer).OK().Bytes()) / float64(b.N)
			b.ReportMetric(0, "ns/op") // of no meaning: two pulls
			b.ReportMetric(per(without), "ms/pull-off")
			b.ReportMetric(per(with), "ms/pull-on")
			b.ReportMetric(per(with-without), "ms-added")
			b.ReportMetric(float64(size), "image-B")
			b.ReportMetric(read, "read-B")
			b.ReportMetric(100*read/float64(size), "read-%")
		})
	}
}
