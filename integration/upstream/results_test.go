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
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// A case that hangs has no verdict, and neither has whatever the run did not come
// to. Neither of them may pass for something that was not there.
func TestReadResults(t *testing.T) {
	got, err := readResults(strings.NewReader(`=== RUN   TestA
=== RUN   TestA/sub
    --- PASS: TestA/sub (0.00s)
--- PASS: TestA (0.01s)
=== RUN   TestB
=== RUN   TestC
--- SKIP: TestC (0.00s)
=== RUN   TestD
--- FAIL: TestD (2.00s)
panic: test timed out`))
	require.NoError(t, err)
	require.Equal(t, results{"TestA": passed, "TestA/sub": passed, "TestB": hung, "TestC": skipped, "TestD": failed}, got)
	require.Equal(t, 2, got.count(passed))
}

// The list of exceptions cannot excuse what passes on stock containerd, and what
// passes nowhere has to be in it.
func TestJudge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "exceptions.txt")
	require.NoError(t, os.WriteFile(path, []byte("# why\n\nx TestRegression not really\nx TestKnown/one needs a thing\nx TestPasses was wrong once\nother TestUnknown for another suite\nx TestUnknown v2.3: has it not\n"), 0o600))
	list, err := readExceptions(path, "v2.4.2")
	require.NoError(t, err)
	require.Len(t, list, 4)
	ofAnother, err := readExceptions(path, "v2.3.7")
	require.NoError(t, err)
	require.Len(t, ofAnother, 5)

	baseline := results{"TestGood": passed, "TestRegression": passed, "TestKnown": failed, "TestKnown/one": failed, "TestUnknown": failed, "TestGone": passed, "TestPasses": failed}
	ours := results{"TestGood": passed, "TestRegression": failed, "TestKnown": failed, "TestKnown/one": failed, "TestUnknown": failed, "TestPasses": passed}
	require.Equal(t, []string{
		"x: TestGone: missing, and passes on stock containerd",
		"x: TestRegression: FAIL, and passes on stock containerd",
		"x: TestUnknown: FAIL, and is not in the list of exceptions",
	}, judge("x", ours, baseline, list))
	used := map[string]bool{}
	for _, e := range list {
		used[e.name] = e.used
	}
	require.Equal(t, map[string]bool{"TestRegression": false, "TestKnown/one": true, "TestPasses": false, "TestUnknown": false}, used)

	require.NoError(t, os.WriteFile(path, []byte("x TestWithoutReason\n"), 0o600))
	_, err = readExceptions(path, "v2.4.2")
	require.ErrorContains(t, err, "exceptions.txt:1")
}

// The list itself can be read, and each of its suites exists.
func TestExceptions(t *testing.T) {
	known := map[string]bool{}
	for _, s := range suites {
		known[s.name] = true
	}
	for _, version := range []string{"v2.3.7", "v2.4.2"} {
		list, err := readExceptions("exceptions.txt", version)
		require.NoError(t, err)
		for _, e := range list {
			require.True(t, known[e.suite], "suite %q of case %s", e.suite, e.name)
		}
	}
}
