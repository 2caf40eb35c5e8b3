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

package harness

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Of what the race detector says only containerd's own is left out, where both sides of
// it are.
func TestDataRaces(t *testing.T) {
	const (
		own    = "github.com/containerd/containerd/v2/client.(*container).Info()"
		other  = "github.com/containerd/plugin.(*Set).Get()"
		report = `==================
WARNING: DATA RACE
Write at 0x00c0005eb5f8 by goroutine 1408:
  %s
      client/container.go:126 +0x20c

Previous write at 0x00c0005eb5f8 by goroutine 127:
  %s
      client/container.go:126 +0x20c
  github.com/containerd/containerd/v2/client.(*container).Info()

Goroutine 127 (running) created at:
  main.main()
==================
`
	)
	n := &Node{paths: paths{t.TempDir()}}
	var log strings.Builder
	for _, sides := range [][]any{{own, own}, {own, other}, {other, own}, {other, other}} {
		fmt.Fprintf(&log, "level=info\n"+report+"level=info\n", sides...)
	}
	require.NoError(t, os.WriteFile(n.LogFile(), []byte(log.String()), 0o600))
	races := n.dataRaces()
	require.Len(t, races, 3)
	for _, r := range races {
		require.Contains(t, r, other)
		require.NotContains(t, r, "level=info")
	}
}
