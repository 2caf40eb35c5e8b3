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
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

func TestMain(m *testing.M) {
	if runChild() {
		return
	}
	os.Exit(m.Run())
}

// counted are the promises that are about counts, which are the same on any
// machine on any day. No promise about time is judged here.
var counted = []string{
	"fsyncs by the snapshotter for each layer",
	"bytes from the registry for 1 layer",
	"bytes from the registry for 60 layers",
	"GET requests for 1 layer",
	"GET requests for 60 layers",
	"record of a layer in containerd's database, image of 60 layers",
}

// The benchmarks are run by hand and would break unseen: here they run on a small
// scale, and have to give the whole table, and the counts that are promised.
func TestShort(t *testing.T) {
	r := newReport(t.Output(), true)
	require.NoError(t, measure(t.Context(), r, short, ""))
	var table strings.Builder
	require.NoError(t, r.writeTable(&table))
	t.Log("\n" + table.String())

	rows := map[string]int{}
	judged := map[string]bool{}
	for _, row := range r.Rows {
		rows[row.Section]++
		require.NotEmpty(t, row.Against, row.What)
		require.Positive(t, row.Rounds, row.What)
		require.Len(t, row.Values, row.Rounds, row.What)
		require.Len(t, row.Peer, row.Rounds, row.What)
		for _, v := range row.Peer {
			require.NotZero(t, v, "%s: the peer, %s", row.What, row.Against)
		}
		for _, what := range counted {
			if row.What == what && row.Met != nil {
				judged[what] = true
				assert.True(t, *row.Met, "%s, against %s: %v, promised: %s", row.What, row.Against, row.Values, row.Target)
			}
		}
	}
	for _, what := range counted {
		assert.True(t, judged[what], "no row is about %s", what)
	}
	assert.Equal(t, map[string]int{
		"The mount helper":   3,
		"Layer preparation":  16,
		"A node that fills":  7,
		"Garbage collection": 2,
		"containerd itself":  8,
		"Pull over CRI, from a registry on this machine": 11,
		"Containers over CRI":                            8,
		"Waits for the disk":                             3,
		"A full node":                                    6,
		"4 pods at once":                                 3,
	}, rows)

	dir := t.TempDir()
	require.NoError(t, r.save(dir))
	var saved report
	text, err := os.ReadFile(filepath.Join(dir, "results.json"))
	require.NoError(t, err)
	require.NoError(t, json.Unmarshal(text, &saved))
	assert.Len(t, saved.Rows, len(r.Rows))
	for name := range pictures {
		svg, err := os.ReadFile(filepath.Join(dir, "pictures", name+".svg"))
		require.NoError(t, err)
		assert.Contains(t, string(svg), "</svg>")
		for _, c := range r.curvesOf(name) {
			assert.Contains(t, string(svg), c.Name)
		}
		assert.NotEmpty(t, r.curvesOf(name), name)
	}
}

// The fsyncs of a layer are counted as zero because nothing failed where every
// write fails. That is worth something only if the seal holds, which the child
// itself sees when it prepares a container.
func TestSeal(t *testing.T) {
	require.NoError(t, prepareSealed(t.TempDir()))
}

// Ratios are made of figures of the same round, whoever's turn it was first; the
// round that warms up is not among them.
func TestInterleave(t *testing.T) {
	var order string
	turns := 0
	measure := func(name string) contender {
		return contender{name, func() (float64, error) {
			order += name
			turns++
			return float64((turns + 1) / 2), nil // the round, from 1
		}}
	}
	const rounds = 20
	r, err := interleave(t.Context(), rounds, measure("a"), measure("b"))
	require.NoError(t, err)
	assert.Len(t, order, 2*(rounds+1))
	assert.NotEqual(t, strings.Repeat(order[:2], rounds+1), order, "the order never changed")
	for round := range rounds {
		assert.InDelta(t, round+2, r["a"][round], 0)
		assert.InDelta(t, round+2, r["b"][round], 0)
	}
	assert.Equal(t, always(1, r["a"]), each(over, r["a"], r["b"]))
	assert.Equal(t, summary{Median: 2.5, Low: 1.75, High: 3.25}, summarize(series{4, 1, 3, 2}))
}
