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

// Package metrics counts, times and traces what containerd asks of the guest-pull
// snapshotter. It wraps a snapshotter; the snapshotter itself knows nothing of it.
//
// The metrics are in the Prometheus registry that containerd serves at
// /v1/metrics of the address which [plugins.'io.containerd.server.v1.metrics']
// configures. Counters start at zero with each start of containerd.
//
//   - containerd_guest_pull_layers_total (counter, layers): image layers that
//     containerd was about to fetch and unpack, and that were left to the guest.
//     A layer that containerd has recorded already, for another image or an
//     earlier pull, is not asked for and not counted again.
//   - containerd_guest_pull_layer_bytes_total (counter, bytes): the sizes of the
//     layers of each image that was pulled, as its manifest has them, which is
//     compressed: what a pull did not download. Stock containerd, and clients that
//     pull by themselves, do not tell of it.
//   - containerd_guest_pull_refused_extractions_total (counter, requests): requests
//     that would have put a layer's content on the host, and were refused.
//   - containerd_guest_pull_container_snapshots (gauge, snapshots), by kind:
//     active, view and committed snapshots that are in the snapshotter's store now.
//   - containerd_guest_pull_operation_seconds (histogram, seconds), by operation:
//     how long calls took. "prepare_layer" is the call about a layer, "prepare"
//     the one about a container.
//   - containerd_guest_pull_errors_total (counter, calls), by operation and kind:
//     calls that failed, by the kind of error in the words of containerd's errdefs.
//   - containerd_guest_pull_user_lookups_total (counter, images), by source and
//     result: pulled images whose users and groups were looked up. The source is
//     "registry"; the result is "read", "known" already, "unusable" (the image has
//     none that can be used), "refused" (the runtime handler has
//     disable_layer_fetch), or "failed".
//
// Spans are made through containerd's pkg/tracing, one for each call, and named
// "snapshotter.guest-pull." and the operation.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/tracing"
	"github.com/containerd/errdefs"
	"github.com/containerd/log"
	gometrics "github.com/docker/go-metrics"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// The operations that are values of the label "operation".
const (
	opPrepareLayer = "prepare_layer"
	opPrepare      = "prepare"
	opView         = "view"
	opMounts       = "mounts"
	opCommit       = "commit"
	opStat         = "stat"
	opUsage        = "usage"
	opUpdate       = "update"
	opRemove       = "remove"
	opWalk         = "walk"
	opCleanup      = "cleanup"
)

// An operation takes from microseconds (a layer) to seconds (a container on a
// slow disk).
var buckets = []float64{.00001, .00005, .0001, .0005, .001, .005, .01, .05, .1, .5, 1, 5, 10}

// Metrics holds the metrics of one snapshotter.
type Metrics struct {
	ns          *gometrics.Namespace
	layers      gometrics.Counter
	layerBytes  gometrics.Counter
	refused     gometrics.Counter
	operations  *prometheus.HistogramVec
	errors      gometrics.LabeledCounter
	userLookups gometrics.LabeledCounter
}

// New returns metrics that are in no registry yet.
func New() *Metrics {
	ns := gometrics.NewNamespace("containerd", "guest_pull", nil)
	m := &Metrics{
		ns:         ns,
		layers:     ns.NewCounter("layers", "image layers that were left to the guest, in layers"),
		layerBytes: ns.NewCounter("layer_bytes", "sizes (compressed, as in the manifest) of the layers of pulled images, which were left to the guest, in bytes"),
		refused:    ns.NewCounter("refused_extractions", "requests to put a layer's content on the host that were refused, in requests"),
		// go-metrics has timers with buckets since the version that containerd 2.4 uses.
		operations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: "containerd",
			Subsystem: "guest_pull",
			Name:      "operation_seconds",
			Help:      "duration of the snapshotter's operations, in seconds",
			Buckets:   buckets,
		}, []string{"operation"}),
		errors:      ns.NewLabeledCounter("errors", "operations of the snapshotter that failed, by kind of error, in calls", "operation", "kind"),
		userLookups: ns.NewLabeledCounter("user_lookups", "images whose users and groups were looked up, in images", "source", "result"),
	}
	ns.Add(m.operations)
	// A counter that is there before it counts is seen to rise from zero.
	for _, result := range []string{"read", "known", "unusable", "refused", "failed"} {
		m.userLookups.WithValues(users.ResolveRegistry, result)
	}
	return m
}

// Register puts the metrics into the registry that containerd serves. It takes
// the place of those of an earlier call.
func (m *Metrics) Register() error {
	err := prometheus.Register(m.ns)
	var earlier prometheus.AlreadyRegisteredError
	if errors.As(err, &earlier) {
		prometheus.Unregister(earlier.ExistingCollector)
		err = prometheus.Register(m.ns)
	}
	if err != nil {
		return fmt.Errorf("register the guest-pull snapshotter's metrics: %w", err)
	}
	return nil
}

// UserLookup counts a look-up of an image's users and groups. The source says
// where they were looked for, and the result what came of it
// (users.Config.Observe).
func (m *Metrics) UserLookup(source, result string) {
	m.userLookups.WithValues(source, result).Inc()
}

// Wrap returns a snapshotter that does what s does, and counts it. It is called
// once.
func (m *Metrics) Wrap(s snapshotter.Snapshotter) snapshotter.Snapshotter {
	m.ns.Add(newGauge(m.ns, s))
	return &wrapper{Snapshotter: s, m: m}
}

type wrapper struct {
	snapshotter.Snapshotter
	m *Metrics
}

// observe begins a call and returns what ends it.
func (w *wrapper) observe(ctx context.Context, op, key, parent string) (context.Context, func(error)) {
	opts := []tracing.SpanOpt{tracing.WithAttribute("snapshotter", "guest-pull")}
	if key != "" {
		opts = append(opts, tracing.WithAttribute("key", key))
	}
	if parent != "" {
		opts = append(opts, tracing.WithAttribute("parent", parent))
	}
	ctx, span := tracing.StartSpan(ctx, tracing.Name("snapshotter.guest-pull", op), opts...)
	start := time.Now()
	return ctx, func(err error) {
		w.m.operations.WithLabelValues(op).Observe(time.Since(start).Seconds())
		if err != nil {
			w.m.errors.WithValues(op, kind(err)).Inc()
			if errors.Is(err, snapshotter.ErrContentOnHost) {
				w.m.refused.Inc()
				log.G(ctx).WithError(err).WithFields(log.Fields{
					"snapshotter": "guest-pull", "key": key, "parent": parent,
				}).Warn("refused to put image content on the host")
			}
		}
		span.SetStatus(err)
		span.End()
	}
}

// Prepare counts the answer for a layer, which is an error by its type only, as
// a success.
func (w *wrapper) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	var info snapshots.Info
	for _, o := range opts {
		if err := o(&info); err != nil {
			return nil, err
		}
	}
	layer, isLayer := snapshotter.AskedLayer(key, info.Labels)
	op := opPrepare
	if isLayer {
		op = opPrepareLayer
	}
	ctx, done := w.observe(ctx, op, key, parent)
	mounts, err := w.Snapshotter.Prepare(ctx, key, parent, opts...)
	if !isLayer || !errdefs.IsAlreadyExists(err) {
		done(err)
		return mounts, err
	}
	done(nil)

	w.m.layers.Inc()
	log.G(ctx).WithFields(log.Fields{"snapshotter": "guest-pull", "key": key, "parent": parent, "chainID": layer}).
		Debug("layer is left to the guest")
	return mounts, err
}

func (w *wrapper) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	ctx, done := w.observe(ctx, opView, key, parent)
	mounts, err := w.Snapshotter.View(ctx, key, parent, opts...)
	done(err)
	return mounts, err
}

func (w *wrapper) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	ctx, done := w.observe(ctx, opMounts, key, "")
	mounts, err := w.Snapshotter.Mounts(ctx, key)
	done(err)
	return mounts, err
}

func (w *wrapper) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	ctx, done := w.observe(ctx, opCommit, key, "")
	err := w.Snapshotter.Commit(ctx, name, key, opts...)
	done(err)
	return err
}

func (w *wrapper) Stat(ctx context.Context, key string) (snapshots.Info, error) {
	ctx, done := w.observe(ctx, opStat, key, "")
	info, err := w.Snapshotter.Stat(ctx, key)
	done(err)
	return info, err
}

func (w *wrapper) Usage(ctx context.Context, key string) (snapshots.Usage, error) {
	ctx, done := w.observe(ctx, opUsage, key, "")
	usage, err := w.Snapshotter.Usage(ctx, key)
	done(err)
	return usage, err
}

func (w *wrapper) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (snapshots.Info, error) {
	ctx, done := w.observe(ctx, opUpdate, info.Name, "")
	updated, err := w.Snapshotter.Update(ctx, info, fieldpaths...)
	done(err)
	return updated, err
}

func (w *wrapper) Remove(ctx context.Context, key string) error {
	ctx, done := w.observe(ctx, opRemove, key, "")
	err := w.Snapshotter.Remove(ctx, key)
	done(err)
	return err
}

func (w *wrapper) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	ctx, done := w.observe(ctx, opWalk, "", "")
	err := w.Snapshotter.Walk(ctx, fn, filters...)
	done(err)
	return err
}

// LayersPrepared is called by a patched containerd at the end of each pull.
func (w *wrapper) LayersPrepared(ctx context.Context, layers []ocispec.Descriptor, diffIDs []digest.Digest,
	fetch func(context.Context, ocispec.Descriptor) (io.ReadCloser, error),
) error {
	for _, l := range layers {
		// A size is what the image's author says. No layer has a tebibyte.
		w.m.layerBytes.Inc(float64(min(max(l.Size, 0), 1<<40)))
	}
	return w.Snapshotter.LayersPrepared(ctx, layers, diffIDs, fetch)
}

// Cleanup is called by containerd's garbage collector.
func (w *wrapper) Cleanup(ctx context.Context) error {
	ctx, done := w.observe(ctx, opCleanup, "", "")
	err := w.Snapshotter.Cleanup(ctx)
	done(err)
	return err
}

// kind names the kind of an error: the words of containerd's errdefs, of which
// there are few.
func kind(err error) string {
	for _, k := range []struct {
		is   func(error) bool
		name string
	}{
		{errdefs.IsCanceled, "canceled"},
		{errdefs.IsDeadlineExceeded, "deadline_exceeded"},
		{errdefs.IsInvalidArgument, "invalid_argument"},
		{errdefs.IsNotFound, "not_found"},
		{errdefs.IsAlreadyExists, "already_exists"},
		{errdefs.IsFailedPrecondition, "failed_precondition"},
		{errdefs.IsNotImplemented, "unimplemented"},
		{errdefs.IsUnavailable, "unavailable"},
	} {
		if k.is(err) {
			return k.name
		}
	}
	return "unknown"
}
