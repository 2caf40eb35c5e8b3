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
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/log"
	gometrics "github.com/docker/go-metrics"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
)

// gauge counts the snapshots of containers when it is asked, so that it cannot
// differ from what is there.
type gauge struct {
	desc *prometheus.Desc
	s    snapshots.Snapshotter
}

func newGauge(ns *gometrics.Namespace, s snapshots.Snapshotter) *gauge {
	return &gauge{
		desc: ns.NewDesc("container_snapshots", "snapshots of containers in the snapshotter's store, by kind, in snapshots", "", "kind"),
		s:    s,
	}
}

// Describe implements prometheus.Collector.
func (g *gauge) Describe(ch chan<- *prometheus.Desc) { ch <- g.desc }

// Collect implements prometheus.Collector.
func (g *gauge) Collect(ch chan<- prometheus.Metric) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	count := map[snapshots.Kind]int{snapshots.KindActive: 0, snapshots.KindView: 0, snapshots.KindCommitted: 0}
	err := g.s.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		// Rows that an older daemon left for image layers are no containers.
		if digest.Digest(i.Name).Validate() != nil {
			count[i.Kind]++
		}
		return ctx.Err()
	})
	if err != nil {
		// An invalid metric would fail the whole scrape, with all of
		// containerd's metrics.
		log.G(ctx).WithError(err).WithField("snapshotter", "guest-pull").Warn("failed to count snapshots for the metrics")
		return
	}
	for kind, n := range count {
		ch <- prometheus.MustNewConstMetric(g.desc, prometheus.GaugeValue, float64(n), label(kind))
	}
}

func label(k snapshots.Kind) string {
	switch k {
	case snapshots.KindView:
		return "view"
	case snapshots.KindCommitted:
		return "committed"
	default:
		return "active"
	}
}
