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

package metrics

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
)

// gather returns the samples by name and label values; of a histogram the count.
func gather(t *testing.T, m *Metrics) map[string]float64 {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	require.NoError(t, r.Register(m.ns))
	families, err := r.Gather()
	require.NoError(t, err)
	samples := map[string]float64{}
	for _, f := range families {
		for _, s := range f.GetMetric() {
			name := []string{strings.TrimPrefix(f.GetName(), "containerd_guest_pull_")}
			for _, l := range s.GetLabel() {
				name = append(name, l.GetValue())
			}
			samples[strings.Join(name, ",")] = s.GetCounter().GetValue() + s.GetGauge().GetValue() + float64(s.GetHistogram().GetSampleCount())
		}
	}
	return samples
}

// unpack asks for a layer as containerd's unpacker does.
func unpack(ctx context.Context, s snapshots.Snapshotter, chainID, parent string) error {
	_, err := s.Prepare(ctx, "k8s.io/1/extract-1-abc "+chainID, parent, snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chainID}))
	return err
}

func newWrapped(t *testing.T, root string) (snapshotter.Snapshotter, *Metrics) {
	t.Helper()
	s, err := snapshotter.New(t.Context(), root, snapshotter.Config{})
	require.NoError(t, err)
	m := New()
	w := m.Wrap(s)
	t.Cleanup(func() { w.Close() })
	return w, m
}

// What is left to the guest is counted in layers and in bytes, and the answer
// that says so ("already exists") is no error.
func TestLayers(t *testing.T) {
	s, m := newWrapped(t, t.TempDir())
	ctx := t.Context()
	chain := []string{digest.FromString("chain 1").String(), digest.FromString("chain 2").String()}
	require.ErrorIs(t, unpack(ctx, s, chain[0], ""), errdefs.ErrAlreadyExists)
	require.ErrorIs(t, unpack(ctx, s, chain[1], chain[0]), errdefs.ErrAlreadyExists)
	// A size is somebody else's text, and a counter panics on a negative number.
	require.NoError(t, s.LayersPrepared(ctx, []ocispec.Descriptor{{Size: 1000}, {Size: 234}, {Size: -5}}, nil, nil))
	got := gather(t, m)
	assert.EqualValues(t, 2, got["layers_total"])
	assert.EqualValues(t, 1234, got["layer_bytes_total"])
	assert.EqualValues(t, 2, got["operation_seconds,prepare_layer"])
	for name := range got {
		assert.False(t, strings.HasPrefix(name, "errors_total"), "%s", name)
	}

	// A pod's label of that name is no layer.
	_, err := s.Prepare(ctx, "k8s.io/1/sandbox", chain[0], snapshots.WithLabels(map[string]string{"containerd.io/snapshot.ref": chain[1]}))
	require.NoError(t, err)
	got = gather(t, m)
	assert.EqualValues(t, 2, got["layers_total"])
	assert.EqualValues(t, 1, got["operation_seconds,prepare"])
}

// Each call is timed under its own name, an error counted by its kind, and a
// refusal as what it is.
func TestOperations(t *testing.T) {
	s, m := newWrapped(t, t.TempDir())
	ctx := t.Context()
	layer := digest.FromString("chain").String()

	_, err := s.Prepare(ctx, "k8s.io/1/c", layer)
	require.NoError(t, err)
	_, err = s.Mounts(ctx, "k8s.io/1/c")
	require.NoError(t, err)
	_, err = s.View(ctx, "k8s.io/2/v", layer)
	require.NoError(t, err)
	_, err = s.Stat(ctx, layer)
	require.NoError(t, err)
	_, err = s.Usage(ctx, layer)
	require.NoError(t, err)
	_, err = s.Update(ctx, snapshots.Info{Name: "k8s.io/1/c", Labels: map[string]string{"a": "b"}}, "labels.a")
	require.NoError(t, err)
	require.NoError(t, s.Commit(ctx, "k8s.io/3/b", "k8s.io/1/c"))
	require.NoError(t, s.Walk(ctx, func(context.Context, snapshots.Info) error { return nil }))
	require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))

	got := gather(t, m)
	for _, op := range []string{"prepare", "mounts", "view", "stat", "usage", "update", "commit", "walk", "cleanup"} {
		assert.EqualValues(t, 1, got["operation_seconds,"+op], op)
	}
	assert.EqualValues(t, 0, got["container_snapshots,active"])
	assert.EqualValues(t, 1, got["container_snapshots,view"])
	assert.EqualValues(t, 1, got["container_snapshots,committed"])

	_, err = s.Prepare(ctx, "k8s.io/4/extract-1-a "+layer, "")
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = s.View(ctx, "k8s.io/5//run/x/image-volumes/pod/image", layer)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition)
	_, err = s.Prepare(ctx, "k8s.io/5/d", "")
	require.NoError(t, err)
	require.NoError(t, s.Remove(ctx, "k8s.io/5/d"))
	require.ErrorIs(t, s.Remove(ctx, "k8s.io/5/d"), errdefs.ErrNotFound)
	_, err = s.Mounts(ctx, layer)
	require.ErrorIs(t, err, errdefs.ErrFailedPrecondition, "this one refuses no content")

	got = gather(t, m)
	assert.EqualValues(t, 2, got["refused_extractions_total"])
	assert.EqualValues(t, 1, got["errors_total,failed_precondition,prepare"])
	assert.EqualValues(t, 1, got["errors_total,failed_precondition,view"])
	assert.EqualValues(t, 1, got["errors_total,failed_precondition,mounts"])
	assert.EqualValues(t, 1, got["errors_total,not_found,remove"])
	assert.EqualValues(t, 2, got["operation_seconds,remove"])

	assert.EqualValues(t, 0, got["user_lookups_total,known,registry"])
	m.UserLookup("registry", "known")
	assert.EqualValues(t, 1, gather(t, m)["user_lookups_total,known,registry"])
	assert.Contains(t, got, "user_lookups_total,failed,registry", "there before it counts")
}

// Rows of an older daemon for image layers are in the store, and no containers.
func TestGaugeLeavesLayersOut(t *testing.T) {
	s, m := newWrapped(t, t.TempDir())
	_, err := s.Prepare(t.Context(), "k8s.io/1/c", "")
	require.NoError(t, err)
	require.NoError(t, s.Commit(t.Context(), digest.FromString("old layer").String(), "k8s.io/1/c"))
	assert.EqualValues(t, 0, gather(t, m)["container_snapshots,committed"])
}

// broken fails as a store on a failing disk does.
type broken struct{ snapshotter.Snapshotter }

func (broken) Walk(context.Context, snapshots.WalkFunc, ...string) error {
	return errors.New("i/o error")
}
func (broken) Mounts(context.Context, string) ([]mount.Mount, error) {
	return nil, context.DeadlineExceeded
}

// A store that cannot be read must not take the other metrics of containerd with
// it, which share the scrape.
func TestBrokenStore(t *testing.T) {
	m := New()
	s := m.Wrap(broken{})
	_, err := s.Mounts(t.Context(), "x")
	require.ErrorIs(t, err, context.DeadlineExceeded)
	got := gather(t, m)
	assert.EqualValues(t, 1, got["errors_total,deadline_exceeded,mounts"])
	assert.NotContains(t, got, "container_snapshots,active")
}

func TestRegister(t *testing.T) {
	first, second := New(), New()
	require.NoError(t, first.Register())
	require.NoError(t, second.Register(), "a second one takes the first one's place")
	t.Cleanup(func() { prometheus.Unregister(second.ns) })
	second.layers.Inc()
	families, err := prometheus.DefaultGatherer.Gather()
	require.NoError(t, err)
	for _, f := range families {
		if f.GetName() == "containerd_guest_pull_layers_total" {
			assert.EqualValues(t, 1, f.GetMetric()[0].GetCounter().GetValue())
			return
		}
	}
	t.Fatal("containerd_guest_pull_layers_total is not in the registry")
}

// Spans carry the call's error, and the answer for a layer is none.
func TestSpans(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	before := otel.GetTracerProvider()
	otel.SetTracerProvider(sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder)))
	t.Cleanup(func() { otel.SetTracerProvider(before) })
	s, _ := newWrapped(t, t.TempDir())
	require.Error(t, unpack(t.Context(), s, digest.FromString("chain").String(), ""))
	require.Error(t, s.Remove(t.Context(), "unknown"))

	var got []string
	for _, span := range recorder.Ended() {
		got = append(got, span.Name()+" "+span.Status().Code.String())
	}
	assert.Equal(t, []string{"snapshotter.guest-pull.prepare_layer Ok", "snapshotter.guest-pull.remove Error"}, got)
}

// The package's documentation is what users read; it names every metric.
func TestDocumented(t *testing.T) {
	m := New()
	m.Wrap(broken{})
	ch := make(chan *prometheus.Desc, 100)
	m.ns.Describe(ch)
	close(ch)
	source, err := os.ReadFile(filepath.Join(".", "metrics.go"))
	require.NoError(t, err)
	doc, _, _ := strings.Cut(string(source), "\npackage metrics\n")
	n := 0
	for d := range ch {
		_, name, _ := strings.Cut(d.String(), `fqName: "`)
		name, _, _ = strings.Cut(name, `"`)
		assert.Contains(t, doc, "//   - "+name+" (", "the package's documentation")
		n++
	}
	assert.Equal(t, 7, n)
}
