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
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
)

const dashboard = "../builder/package/grafana/guest-pull.json"

func get(t *testing.T, address string) (int, string) {
	t.Helper()
	client := http.Client{Timeout: 10 * time.Second}
	r, err := client.Get(address)
	require.NoError(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	require.NoError(t, err)
	return r.StatusCode, string(b)
}

// sample is a line of Prometheus's text format.
type sample struct {
	name   string
	labels map[string]string
	value  float64
}

var (
	sampleLine = regexp.MustCompile(`(?m)^(\w+)(?:\{(.*)\})? (\S+)$`)
	labelPair  = regexp.MustCompile(`(\w+)="((?:[^"\\]|\\.)*)"`)
)

type samples []sample

// readMetrics reads containerd's metrics.
func readMetrics(t *testing.T, address string) (all samples) {
	t.Helper()
	for _, m := range sampleLine.FindAllStringSubmatch(scrape(t, address), -1) {
		v, err := strconv.ParseFloat(m[3], 64)
		require.NoError(t, err)
		s := sample{m[1], map[string]string{}, v}
		for _, l := range labelPair.FindAllStringSubmatch(m[2], -1) {
			s.labels[l[1]] = l[2]
		}
		all = append(all, s)
	}
	return all
}

// sum adds up the samples of a metric of ours that have these label values, given
// as name and value in turn.
func (all samples) sum(name string, labels ...string) (sum float64) {
	for _, s := range all {
		match := s.name == "containerd_guest_pull_"+name
		for i := 0; match && i < len(labels); i += 2 {
			match = s.labels[labels[i]] == labels[i+1]
		}
		if match {
			sum += s.value
		}
	}
	return sum
}

// What is kept off the host, refused and done is in containerd's own metrics, and
// the numbers are those of the registry. A dashboard that asks for something that
// is not there would show nothing and say nothing, so each of its queries is held
// against the metrics.
func TestMetrics(t *testing.T) {
	ctx := t.Context()
	reg := newRegistry(t)
	address := freeAddress(t)
	n := harness.New(t, harness.Options{Registry: reg, ExtraConfig: `
[plugins.'io.containerd.server.v1.metrics']
  address = "` + address + `"
`})
	all := readMetrics(t, address)
	for _, name := range []string{"layers_total", "layer_bytes_total", "refused_extractions_total", "container_snapshots"} {
		require.Zero(t, all.sum(name), name)
	}

	img := push(t, reg, images.Spec{Name: "app", Layers: 5})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	before := readMetrics(t, address) // the pause image is in it
	c := run(t, pod, harness.ContainerSpec{Image: img.Ref})
	requireRuns(t, c, img)

	all = readMetrics(t, address)
	require.EqualValues(t, len(img.Layers), all.sum("layers_total")-before.sum("layers_total"))
	if hasPatch(n, "0008") { // which tells of the layers' sizes
		require.EqualValues(t, img.bytes(t), all.sum("layer_bytes_total")-before.sum("layer_bytes_total"))
		require.EqualValues(t, status(t, n).BytesOffHost, all.sum("layer_bytes_total"), "the status and the metrics")
	}
	require.EqualValues(t, 2, all.sum("container_snapshots", "kind", "active"))
	require.EqualValues(t, all.sum("layers_total"), all.sum("operation_seconds_count", "operation", "prepare_layer"))
	require.EqualValues(t, 2, all.sum("operation_seconds_count", "operation", "prepare"))
	require.Zero(t, all.sum("refused_extractions_total"))
	require.Zero(t, all.sum("errors_total", "operation", "prepare_layer"))

	// A client that would extract the image on the host.
	_, err := n.Ctr(ctx, "images", "pull", "--local", "--plain-http", "--snapshotter", harness.Snapshotter, push(t, reg, images.Spec{Name: "other"}).Ref)
	require.ErrorContains(t, err, "keeps image content off the host")
	all = readMetrics(t, address)
	require.EqualValues(t, 1, all.sum("refused_extractions_total"))
	require.EqualValues(t, 1, all.sum("errors_total", "operation", "prepare", "kind", "failed_precondition"))

	queries := dashboardQueries(t)
	t.Run("dashboard", func(t *testing.T) {
		for _, q := range queries {
			requireAnswerable(t, all, q)
		}
	})
	t.Run("prometheus", func(t *testing.T) {
		prometheus, err := exec.LookPath("prometheus")
		if err != nil {
			t.Skipf("there is no Prometheus to ask the dashboard's queries: %v (apt-get install prometheus)", err)
		}
		server := startPrometheus(t, prometheus, address)
		// A rate is of what happens while Prometheus looks.
		run(t, pod, harness.ContainerSpec{Image: push(t, reg, images.Spec{Name: "seen", Layers: 3}).Ref})
		waitScrapes(t, server, 10)
		for _, q := range queries {
			requireAnswered(t, server, q)
		}
		if hasPatch(n, "0008") {
			require.NotContains(t, string(ask(t, server, "sum(increase(containerd_guest_pull_layer_bytes_total[1m]))")[0]), `"0"`)
		}
	})

	require.NoError(t, pod.Remove(ctx))
	require.NoError(t, n.GC(ctx))
	require.Zero(t, readMetrics(t, address).sum("container_snapshots"))
}

// dashboardQueries returns the PromQL expressions of the dashboard.
func dashboardQueries(t *testing.T) (queries []string) {
	t.Helper()
	b, err := os.ReadFile(dashboard)
	require.NoError(t, err)
	var d struct {
		Panels []struct {
			Type    string
			Title   string
			Targets []struct{ Expr string }
		}
		Templating struct{ List []struct{ Name string } }
	}
	require.NoError(t, json.Unmarshal(b, &d))
	for _, p := range d.Panels {
		if p.Type != "row" {
			require.NotEmpty(t, p.Targets, p.Title)
		}
		for _, target := range p.Targets {
			queries = append(queries, target.Expr)
		}
	}
	require.Greater(t, len(queries), 10)
	return queries
}

var (
	metricName = regexp.MustCompile(`\b(containerd_\w+)\{`)
	grouping   = regexp.MustCompile(`\bby \(([^)]*)\)`)
)

// requireAnswerable holds that containerd exports the metrics of a query, with
// the labels by which it groups them.
func requireAnswerable(t *testing.T, all samples, query string) {
	t.Helper()
	names := metricName.FindAllStringSubmatch(query, -1)
	require.NotEmpty(t, names, query)
	for _, name := range names {
		var found []sample
		for _, s := range all {
			if s.name == name[1] {
				found = append(found, s)
			}
		}
		require.NotEmpty(t, found, "%s: containerd does not export %s", query, name[1])
		for _, g := range grouping.FindAllStringSubmatch(query, -1) {
			for label := range strings.SplitSeq(g[1], ",") {
				if label = strings.TrimSpace(label); label != "instance" {
					require.Contains(t, found[0].labels, label, query)
				}
			}
		}
	}
}

// startPrometheus starts a Prometheus that scrapes containerd, and waits until it
// has done so several times. It returns its address.
func startPrometheus(t *testing.T, program, target string) string {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	require.NoError(t, os.WriteFile(config, fmt.Appendf(nil, `
global: {scrape_interval: 500ms}
scrape_configs:
  - job_name: containerd
    metrics_path: /v1/metrics
    static_configs: [{targets: [%q]}]
`, target), 0o600))
	address := freeAddress(t)
	cmd := exec.Command(program, "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+address)
	log, err := os.Create(filepath.Join(dir, "log"))
	require.NoError(t, err)
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	require.NoError(t, cmd.Start())
	t.Cleanup(func() {
		require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
		cmd.Wait() // its exit code does not matter
	})
	require.Eventually(t, func() bool {
		c, err := net.Dial("tcp", address)
		if err != nil {
			return false
		}
		c.Close()
		return true
	}, 30*time.Second, 200*time.Millisecond, "Prometheus does not start")
	waitScrapes(t, address, 3)
	return address
}

// waitScrapes waits until a Prometheus has scraped containerd so many times.
func waitScrapes(t *testing.T, address string, times int) {
	t.Helper()
	require.Eventually(t, func() bool {
		return len(ask(t, address, fmt.Sprintf("count_over_time(containerd_guest_pull_layers_total[1m]) >= %d", times))) > 0
	}, 30*time.Second, 200*time.Millisecond, "Prometheus does not scrape containerd")
}

// ask asks a Prometheus and returns the result of an instant query, nil when it
// cannot answer yet.
func ask(t *testing.T, address, query string) []json.RawMessage {
	t.Helper()
	code, body := get(t, "http://"+address+"/api/v1/query?query="+url.QueryEscape(query))
	if code == http.StatusServiceUnavailable { // it is starting
		return nil
	}
	var r struct {
		Status, Error string
		Data          struct{ Result []json.RawMessage }
	}
	require.NoError(t, json.Unmarshal([]byte(body), &r), body)
	require.Equal(t, "success", r.Status, "%s: %s", query, r.Error)
	return r.Data.Result
}

// requireAnswered holds that a Prometheus has an answer for a query.
func requireAnswered(t *testing.T, address, query string) {
	t.Helper()
	query = strings.NewReplacer("$__rate_interval", "30s", "$__range", "1m", "$instance", ".*").Replace(query)
	require.NotContains(t, query, "$", "a variable that is not known here")
	result := ask(t, address, query)
	require.NotEmpty(t, result, query)
	for _, r := range result {
		// An operation that nobody has called meanwhile has no mean.
		if !strings.Contains(string(r), "NaN") {
			return
		}
	}
	t.Errorf("%s: no answer but %s", query, result)
}
