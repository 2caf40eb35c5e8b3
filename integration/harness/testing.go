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
	"context"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// New starts a node for a test. When the test ends, what it left is removed as
// kubelet would, and the node must then be empty and shut down cleanly. Of a
// test that failed the end of containerd's log and of the registry's are printed;
// with GUEST_PULL_KEEP set, all files stay.
func New(t testing.TB, o Options) *Node {
	t.Helper()
	n, err := Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if !t.Failed() {
			if n.process == nil {
				t.Error("the test left the node without a running containerd")
			} else if err := n.Empty(ctx); err != nil {
				t.Errorf("emptying the node: %v", err)
			} else if err := n.CheckEmpty(ctx); err != nil {
				t.Error(err)
			}
		}
		for _, report := range n.dataRaces() {
			t.Errorf("containerd's race detector says:\n%s", report)
		}
		if t.Failed() {
			t.Logf("the last lines of containerd's log:\n%s", tail(n.LogTail(maxLines)))
			if o.Registry != nil {
				t.Logf("the last requests to the registry:\n%s", tail(o.Registry.Log().String()))
			}
		}
		if err := n.Close(); err != nil {
			t.Errorf("closing the node: %v", err)
		}
	})
	return n
}

var (
	dataRace = regexp.MustCompile(`(?s)WARNING: DATA RACE\n.*?={18}`)
	// containerd's own: CRI has one object for each container, in which any call of Info
	// leaves what it read (client/container.go).
	containerInfoRace = regexp.MustCompile(`^WARNING: DATA RACE\n(?s:.*?)at 0x\w+ by .*\n  \S+/client\.\(\*container\)\.Info\(\)\n(?s:.*?)at 0x\w+ by .*\n  \S+/client\.\(\*container\)\.Info\(\)\n`)
)

// dataRaces returns what the race detector has reported, of a containerd that is built
// with it (make race). A race may end a containerd without it ("concurrent map read and
// map write"), once in a thousand starts.
func (n *Node) dataRaces() []string {
	log, err := os.ReadFile(n.log())
	if err != nil {
		return []string{err.Error()}
	}
	return slices.DeleteFunc(dataRace.FindAllString(string(log), -1), containerInfoRace.MatchString)
}

const maxLines = 100

// tail shortens what is printed of a test that failed: some lines are very long.
func tail(text string) string {
	lines := strings.Split(text, "\n")
	lines = lines[max(0, len(lines)-maxLines):]
	for i, l := range lines {
		if len(l) > 400 {
			lines[i] = l[:400] + "..."
		}
	}
	return strings.Join(lines, "\n")
}
