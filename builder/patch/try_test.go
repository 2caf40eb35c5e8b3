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
	"archive/zip"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// serve makes the go command find a version of the module, made of what is in
// cache/ with more lines at the top of its file, in a module proxy on disk.
func serve(t *testing.T, version, top string) {
	t.Helper()
	proxy := t.TempDir()
	dir := filepath.Join(proxy, "example.com/greeter/v2/@v")
	require.NoError(t, os.MkdirAll(dir, 0o755))
	gomod, err := os.ReadFile("cache/go.mod")
	require.NoError(t, err)
	source := strings.Replace(greetSource, "package greet\n", "package greet\n"+top, 1)
	var archive bytes.Buffer
	z := zip.NewWriter(&archive)
	for name, content := range map[string]string{"go.mod": string(gomod), "greet/greet.go": source} {
		w, err := z.Create("example.com/greeter/v2@" + version + "/" + name)
		require.NoError(t, err)
		_, err = w.Write([]byte(content))
		require.NoError(t, err)
	}
	require.NoError(t, z.Close())
	for name, content := range map[string][]byte{
		".info": fmt.Appendf(nil, `{"Version":%q}`, version), ".mod": gomod, ".zip": archive.Bytes(),
	} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, version+name), content, 0o644))
	}
	t.Setenv("GOPROXY", "file://"+proxy)
	t.Setenv("GONOSUMDB", "*")
	t.Setenv("GOFLAGS", "-modcacherw")
	t.Setenv("GOMODCACHE", t.TempDir())
}

const (
	greetTest = `diff --git a/greet/greet_test.go b/greet/greet_test.go
new file mode 100644
--- /dev/null
+++ b/greet/greet_test.go
@@ -0,0 +1,9 @@
+package greet
+
+import "testing"
+
+func TestGreet(t *testing.T) {
+	if Greet() != "good morning" {
+		t.Fatal(Greet())
+	}
+}
`
	stalePatch = `diff --git a/greet/greet.go b/greet/greet.go
--- a/greet/greet.go
+++ b/greet/greet.go
@@ -4,4 +4,4 @@ package greet
 func Greet() string {
-	return "ahoy"
+	return "ay"
 }
 
`
	brokenPatch = `diff --git a/greet/broken.go b/greet/broken.go
new file mode 100644
--- /dev/null
+++ b/greet/broken.go
@@ -0,0 +1,3 @@
+package greet
+
+var broken = missing
`
	unbrokenPatch = `diff --git a/greet/broken.go b/greet/broken.go
--- a/greet/broken.go
+++ b/greet/broken.go
@@ -1,3 +1,3 @@
 package greet
 
-var broken = missing
+var Broken = 0
diff --git a/greet/greet_test.go b/greet/greet_test.go
--- a/greet/greet_test.go
+++ b/greet/greet_test.go
@@ -5,5 +5,5 @@ import "testing"
 func TestGreet(t *testing.T) {
-	if Greet() != "good morning" {
+	if Greet() != "good night" {
 		t.Fatal(Greet())
 	}
 }
`
)

// TestTry guards what somebody sees who carries the patches over: each outcome,
// with what there is to say about it, and that one patch which does not apply or
// build is no reason to say nothing of the others.
func TestTry(t *testing.T) {
	newProject(t, map[string]string{
		"0001-greet.patch":    greetPatch + greetTest,
		"0002-stale.patch":    stalePatch,
		"0003-broken.patch":   brokenPatch,
		"0004-unbroken.patch": unbrokenPatch,
		"0005-part.patch":     partPatch,
	})
	args := []string{"-module=example.com/greeter/v2", "-patches=patches", "-try=v2.5.0"}
	serve(t, "v2.5.0", "\n// Something new.\n")
	err := run(t.Context(), []string{args[0], args[1], "-try=v2.6.0"}, &bytes.Buffer{})
	require.ErrorContains(t, err, "v2.6.0.info", "nothing of why it cannot be had")
	var out bytes.Buffer
	err = run(t.Context(), args, &out)
	require.ErrorIs(t, err, errTry)
	assert.ErrorContains(t, err, "3 of 5")
	text := out.String()
	assert.Contains(t, text, "example.com/greeter/v2@v2.5.0, with the patches of v2.4, in .build/try/v2.5.0/greeter\n")
	for _, row := range []string{
		"| 0001-greet | with an offset (1 hunks) | yes | pass (1), fail without |",
		"| 0002-stale | **conflicts** (1 hunks) |  |  |",
		"| 0003-broken | yes | **no** |  |",
		"| 0004-unbroken | yes | yes | **fail** |",
		"| 0005-part | with an offset (1 hunks) | yes | none |",
	} {
		assert.Contains(t, text, row+"\n")
	}
	assert.Contains(t, text, "\n0002-stale\n    greet/greet.go: hunk #1: @@ -4,4 +4,4 @@ package greet\n")
	assert.Regexp(t, `\n0003-broken\n.*\n? *.*undefined: missing`, text)
	assert.Regexp(t, `\n0004-unbroken\n(.*\n)*.*--- FAIL: TestGreet`, text)

	// A version of a line is tried with the patches of its own line.
	require.NoError(t, os.CopyFS("patches/v2.5", os.DirFS("patches/v2.4")))
	for _, stale := range []string{"0002-stale", "0003-broken", "0004-unbroken"} {
		require.NoError(t, os.Remove("patches/v2.5/"+stale+".patch"))
	}
	gomod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile("patches/v2.5/go.mod", []byte(strings.ReplaceAll(string(gomod), "v2.4.2", "v2.5.0")), 0o644))
	out.Reset()
	require.NoError(t, run(t.Context(), args, &out), "%s", &out)
	assert.Contains(t, out.String(), "with the patches of v2.5")

	require.ErrorContains(t, run(t.Context(), []string{args[0], args[1], "-try=v2.6.0"}, &out), "v2.6.0")
}
