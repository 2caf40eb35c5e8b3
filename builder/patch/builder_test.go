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
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

const (
	greetSource = `package greet

// Greet greets.
func Greet() string {
	return "hello"
}

// Part parts.
func Part() string {
	return "bye"
}
`
	greetPatch = `Say good morning.

A preamble, as git format-patch writes one.
---
 greet/greet.go | 2 +-

diff --git a/greet/greet.go b/greet/greet.go
--- a/greet/greet.go
+++ b/greet/greet.go
@@ -3,5 +3,5 @@ package greet
 // Greet greets.
 func Greet() string {
-	return "hello"
+	return "good morning"
 }
 
`
	partPatch = `diff --git a/greet/greet.go b/greet/greet.go
--- a/greet/greet.go
+++ b/greet/greet.go
@@ -8,4 +8,4 @@ func Greet() string {
 // Part parts.
 func Part() string {
-	return "bye"
+	return "good night"
 }
diff --git a/more/more.go b/more/more.go
new file mode 100644
--- /dev/null
+++ b/more/more.go
@@ -0,0 +1,1 @@
+package more
diff --git a/README b/README
new file mode 100644
--- /dev/null
+++ b/README
@@ -0,0 +1,1 @@
+Not Go.
`
)

// newProject makes a main module that pins example.com/greeter/v2 v2.4.2, the
// module itself (read-only, as in the module cache) and a directory of patches,
// and changes to it. The main module sits in a git repository, because what git
// does in a directory depends on whether it finds a repository around it.
func newProject(t *testing.T, patches map[string]string) builder {
	t.Helper()
	root := t.TempDir()
	write := func(mode os.FileMode, name, content string) {
		name = filepath.Join(root, name)
		require.NoError(t, os.MkdirAll(filepath.Dir(name), 0o755))
		require.NoError(t, os.WriteFile(name, []byte(content), mode))
	}
	write(0o644, "go.mod", `module example.com/app

go 1.26

require example.com/greeter/v2 v2.4.2

replace example.com/greeter/v2 => ./cache
`)
	write(0o644, "main.go", `package main

import "example.com/greeter/v2/greet"

func main() { println(greet.Greet() + ", " + greet.Part()) }
`)
	write(0o444, "cache/go.mod", "module example.com/greeter/v2\n\ngo 1.26\n")
	write(0o444, "cache/greet/greet.go", greetSource)
	for name, content := range patches {
		write(0o644, filepath.Join("patches/v2.4", name), content)
	}
	t.Chdir(root)
	t.Setenv("GOFLAGS", "") // of whoever tests a line
	out, err := exec.Command("git", "init", "--quiet", ".").CombinedOutput()
	require.NoError(t, err, "%s", out)
	return builder{module: "example.com/greeter/v2", patches: "patches", out: ".build/patched"}
}

func runApp(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command("go", append(append([]string{"run"}, args...), ".")...).CombinedOutput()
	require.NoError(t, err, "%s", out)
	return strings.TrimSpace(string(out))
}

// TestBuild guards the whole way to a binary: what go build -modfile compiles is
// the patched copy, and the plain build still is the module itself.
func TestBuild(t *testing.T) {
	b := newProject(t, map[string]string{
		"0001-greet.patch": greetPatch,
		"0002-part.patch":  partPatch,
		"README.md":        "not a patch",
	})
	r, err := b.build(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "v2.4.2", r.Version)
	assert.Equal(t, []string{"0001-greet", "0002-part"}, r.Patches)
	assert.Equal(t, []string{"./greet", "./more"}, r.Packages)

	assert.Equal(t, "good morning, good night", runApp(t, "-modfile=.build/patched/go.mod"))
	assert.Equal(t, "hello, bye", runApp(t))
	source, err := os.ReadFile("cache/greet/greet.go")
	require.NoError(t, err)
	assert.Equal(t, greetSource, string(source), "the module cache must not change")
	assertNoStage(t, b)
}

// TestBuildLines guards that each line is made of its own version of the module,
// the patches that all have in common, and its own, by number whichever directory
// they are in.
func TestBuildLines(t *testing.T) {
	evening := strings.NewReplacer(`"hello"`, `"good morning"`, `"good morning"`, `"good evening"`).Replace(greetPatch)
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch, "0003-part.patch": partPatch})
	b.out = ""
	require.NoError(t, os.Mkdir("patches/common", 0o755))
	require.NoError(t, os.WriteFile("patches/common/0002-evening.patch", []byte(evening), 0o644))
	require.NoError(t, os.Mkdir("patches/v2.3", 0o755))
	require.NoError(t, os.WriteFile("patches/v2.3/0001-greet.patch",
		[]byte(strings.ReplaceAll(strings.ReplaceAll(greetPatch, `"hello"`, `"hi"`), "Greet greets", "Greet greeted")), 0o644))
	require.NoError(t, os.CopyFS("older", os.DirFS("cache")))
	source, err := os.ReadFile("older/greet/greet.go")
	require.NoError(t, err)
	require.NoError(t, os.Chmod("older/greet/greet.go", 0o644))
	require.NoError(t, os.WriteFile("older/greet/greet.go",
		[]byte(strings.ReplaceAll(strings.ReplaceAll(string(source), `"hello"`, `"hi"`), "Greet greets", "Greet greeted")), 0o644))
	gomod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	require.NoError(t, os.WriteFile("patches/v2.3/go.mod",
		[]byte(strings.NewReplacer("v2.4.2", "v2.3.7", "./cache", "./older").Replace(string(gomod))), 0o644))
	// The second patch finds both forms of the first one.
	require.NoError(t, os.WriteFile("patches/common/0002-evening.patch", []byte(strings.Replace(evening,
		"@@ -3,5 +3,5 @@ package greet\n // Greet greets.\n", "@@ -4,4 +4,4 @@ package greet\n", 1)), 0o644))

	for _, tc := range []struct {
		line, version, says string
		patches             []string
	}{
		{"", "v2.4.2", "good evening, good night", []string{"0001-greet", "0002-evening", "0003-part"}},
		{"2.4", "v2.4.2", "good evening, good night", []string{"0001-greet", "0002-evening", "0003-part"}},
		{"2.3", "v2.3.7", "good evening, bye", []string{"0001-greet", "0002-evening"}},
	} {
		b.line = tc.line
		r, err := b.build(t.Context())
		require.NoError(t, err, tc.line)
		assert.Equal(t, tc.version, r.Version)
		assert.Equal(t, tc.patches, r.Patches)
		assert.Equal(t, tc.says, runApp(t, "-modfile=.build/"+tc.version[:4]+"/patched/go.mod"), tc.line)
	}
	var stdout bytes.Buffer
	require.NoError(t, run(t.Context(), []string{"-module=" + b.module, "-patches=patches", "-line=2.3", "-series"}, &stdout))
	assert.Equal(t, "patches/v2.3/0001-greet.patch\npatches/common/0002-evening.patch\n", stdout.String())
}

// TestBuildOrder guards that patches are applied in the order of their names:
// the second one changes what the first one wrote.
func TestBuildOrder(t *testing.T) {
	b := newProject(t, map[string]string{
		"0002-evening.patch": strings.NewReplacer(`"hello"`, `"good morning"`, `"good morning"`, `"good evening"`).Replace(greetPatch),
		"0001-greet.patch":   greetPatch,
	})
	_, err := b.build(t.Context())
	require.NoError(t, err)
	assert.Equal(t, "good evening, bye", runApp(t, "-modfile=.build/patched/go.mod"))
}

// TestBuildUnchanged guards that a build with nothing to do leaves the copy
// alone (a new one would make the go command compile everything again), and
// that each thing that the copy is made from makes a new one.
func TestBuildUnchanged(t *testing.T) {
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch})
	first, err := b.build(t.Context())
	require.NoError(t, err)

	const marker = ".build/patched/greeter/marker"
	mark := func() { require.NoError(t, os.WriteFile(marker, nil, 0o644)) }
	mark()
	again, err := b.build(t.Context())
	require.NoError(t, err)
	assert.Equal(t, first, again)
	assert.FileExists(t, marker)

	for _, step := range []struct {
		name   string
		change func() error
	}{
		{"patch added", func() error {
			return os.WriteFile("patches/v2.4/0002-part.patch", []byte(partPatch), 0o644)
		}},
		{"patch changed", func() error {
			return os.WriteFile("patches/v2.4/0001-greet.patch", []byte(strings.ReplaceAll(greetPatch, "good morning", "hi")), 0o644)
		}},
		{"patch renamed", func() error {
			return os.Rename("patches/v2.4/0001-greet.patch", "patches/v2.4/0001-renamed.patch")
		}},
		{"go.mod changed", func() error {
			f, err := os.OpenFile("go.mod", os.O_APPEND|os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString("\n// A comment.\n")
			return err
		}},
		{"modfile lost", func() error { return os.Remove(".build/patched/go.mod") }},
		{"stamp lost", func() error { return os.Remove(".build/patched/greeter/" + stampName) }},
		{"copy lost", func() error { return os.RemoveAll(".build/patched/greeter") }},
	} {
		require.NoError(t, step.change(), step.name)
		_, err := b.build(t.Context())
		require.NoError(t, err, step.name)
		assert.NoFileExists(t, marker, step.name)
		runApp(t, "-modfile=.build/patched/go.mod")
		mark()
	}
}

// TestBuildDoesNotApply guards what a maintainer sees when containerd moves on,
// and that a failed build leaves nothing that a later build would take for a
// patched copy.
func TestBuildDoesNotApply(t *testing.T) {
	// The second hunk expects what the first patch has already changed.
	stale := `diff --git a/greet/greet.go b/greet/greet.go
--- a/greet/greet.go
+++ b/greet/greet.go
@@ -1,3 +1,4 @@
 package greet
 
+// Package greet.
 // Greet greets.
@@ -4,3 +5,3 @@ package greet
 func Greet() string {
-	return "hello"
+	return "ahoy"
 }
`
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch, "0002-stale.patch": stale})
	_, err := b.build(t.Context())
	require.Error(t, err)
	assert.ErrorContains(t, err, "patches/v2.4/0002-stale.patch does not apply to example.com/greeter/v2@v2.4.2")
	assert.ErrorContains(t, err, "greet/greet.go: hunk #2: @@ -4,3 +5,3 @@ package greet")
	assert.ErrorContains(t, err, `return "hello"`, "the lines that were looked for")
	assert.NoFileExists(t, filepath.Join(b.out, "go.mod"))
	assert.NoDirExists(t, filepath.Join(b.out, "greeter"))
	assertNoStage(t, b)
}

// TestBuildFailureKeepsOldCopy guards that the copy of an earlier build survives
// a patch that does not apply, but is not taken for the new one.
func TestBuildFailureKeepsOldCopy(t *testing.T) {
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch})
	_, err := b.build(t.Context())
	require.NoError(t, err)
	require.NoError(t, os.WriteFile("patches/v2.4/0002-again.patch", []byte(greetPatch), 0o644))
	for range 2 {
		_, err = b.build(t.Context())
		require.ErrorContains(t, err, "0002-again.patch does not apply")
	}
	assert.DirExists(t, filepath.Join(b.out, "greeter"))
}

// TestBuildNoFuzz guards that context is matched exactly: a hunk whose context
// has changed may have lost its meaning, even if its own line is still there.
func TestBuildNoFuzz(t *testing.T) {
	b := newProject(t, map[string]string{
		"0001-greet.patch": strings.Replace(greetPatch, "// Greet greets.", "// Greet salutes.", 1),
	})
	_, err := b.build(t.Context())
	assert.ErrorContains(t, err, "greet/greet.go: hunk #1: @@ -3,5 +3,5 @@ package greet")
}

// TestBuildBadInput guards that input that would patch nothing is an error.
func TestBuildBadInput(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(t *testing.T, b *builder)
		want   []string
	}{
		"no patches for the version": {
			change: func(t *testing.T, _ *builder) { require.NoError(t, os.Rename("patches/v2.4", "patches/v2.3")) },
			want:   []string{"no patches for example.com/greeter/v2 v2.4", "port the patches to it"},
		},
		"an empty directory": {
			change: func(t *testing.T, _ *builder) { require.NoError(t, os.Remove("patches/v2.4/0001-greet.patch")) },
			want:   []string{"neither common nor v2.4 in patches has a file *.patch"},
		},
		"one number twice": {
			change: func(t *testing.T, _ *builder) {
				require.NoError(t, os.CopyFS("patches/common", os.DirFS("patches/v2.4")))
			},
			want: []string{"patches/common/0001-greet.patch", "patches/v2.4/0001-greet.patch", "not in both"},
		},
		"a line that is not there": {
			change: func(_ *testing.T, b *builder) { b.line = "2.9" },
			want:   []string{"no line 2.9", "no go.mod in patches/v2.9", "go.mod has example.com/greeter/v2@v2.4.2"},
		},
		"not a patch": {
			change: func(t *testing.T, _ *builder) {
				require.NoError(t, os.WriteFile("patches/v2.4/0002-none.patch", []byte("Nothing.\n"), 0o644))
			},
			want: []string{"0002-none.patch does not apply to example.com/greeter/v2@v2.4.2"},
		},
		"a patch that leaves the tree": {
			change: func(t *testing.T, _ *builder) {
				require.NoError(t, os.WriteFile("patches/v2.4/0002-out.patch",
					[]byte(strings.ReplaceAll(partPatch, "/README", "/../README")), 0o644))
			},
			want: []string{"0002-out.patch does not apply", "README"},
		},
		"a module that is not required": {
			change: func(_ *testing.T, b *builder) { b.module = "example.com/other" },
			want:   []string{"go list", "example.com/other"},
		},
		"not the main module's root": {
			change: func(t *testing.T, b *builder) {
				b.patches, b.out = "../patches", "../.build/patched"
				t.Chdir("cache")
			},
			want: []string{"example.com/greeter/v2"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			b := newProject(t, map[string]string{"0001-greet.patch": greetPatch})
			tc.change(t, &b)
			_, err := b.build(t.Context())
			require.Error(t, err)
			for _, want := range tc.want {
				assert.ErrorContains(t, err, want)
			}
		})
	}
}

// TestBuildInterrupted guards that whatever a killed run left behind is neither
// used nor kept.
func TestBuildInterrupted(t *testing.T) {
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch})
	require.NoError(t, os.MkdirAll(".build/patched/.stage-1/copy/greet", 0o755))
	require.NoError(t, os.MkdirAll(".build/patched/greeter", 0o755), "a copy without a stamp")
	require.NoError(t, os.WriteFile(".build/patched/greeter/"+stampName, []byte("{"), 0o644))
	_, err := b.build(t.Context())
	require.NoError(t, err)
	assertNoStage(t, b)
	assert.Equal(t, "good morning, bye", runApp(t, "-modfile=.build/patched/go.mod"))

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = b.build(ctx)
	require.ErrorIs(t, err, context.Canceled)
	assertNoStage(t, b)
}

// TestBuildConcurrent guards against two builds (make -j) that work in the same
// directory.
func TestBuildConcurrent(t *testing.T) {
	b := newProject(t, map[string]string{"0001-greet.patch": greetPatch})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			_, err := b.build(t.Context())
			assert.NoError(t, err)
		})
	}
	wg.Wait()
	assertNoStage(t, b)
	assert.Equal(t, "good morning, bye", runApp(t, "-modfile=.build/patched/go.mod"))
}

// TestGitSettings guards that the user's git configuration and environment do
// not change what is applied.
func TestGitSettings(t *testing.T) {
	b := newProject(t, map[string]string{"0001-greet.patch": strings.ReplaceAll(greetPatch, "good morning\"", "good morning\" ")})
	home := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(home, ".gitconfig"), []byte("[apply]\n\twhitespace = error-all\n"), 0o644))
	t.Setenv("HOME", home)
	t.Setenv("GIT_DIR", filepath.Join(home, "nothing"))
	t.Setenv("GIT_CONFIG_COUNT", "1")
	t.Setenv("GIT_CONFIG_KEY_0", "apply.whitespace")
	t.Setenv("GIT_CONFIG_VALUE_0", "error-all")
	_, err := b.build(t.Context())
	require.NoError(t, err)
	source, err := os.ReadFile(".build/patched/greeter/greet/greet.go")
	require.NoError(t, err)
	assert.Contains(t, string(source), "\"good morning\" \n")
}

// TestRun guards the interface that the Makefile uses.
func TestRun(t *testing.T) {
	newProject(t, map[string]string{"0001-greet.patch": greetPatch, "0002-part.patch": partPatch})
	args := []string{"-module=example.com/greeter/v2", "-patches=patches", "-out=.build/elsewhere"}
	for flag, want := range map[string]string{
		"":          "",
		"-list":     "0001-greet,0002-part\n",
		"-packages": "./greet\n./more\n",
	} {
		var stdout bytes.Buffer
		a := args
		if flag != "" {
			a = append(a, flag)
		}
		require.NoError(t, run(t.Context(), a, &stdout))
		assert.Equal(t, want, stdout.String(), flag)
	}
	assert.Equal(t, "good morning, good night", runApp(t, "-modfile=.build/elsewhere/go.mod"))
	assert.ErrorContains(t, run(t.Context(), []string{"extra"}, &bytes.Buffer{}), "extra")
}

func assertNoStage(t *testing.T, b builder) {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(b.out, ".stage-*"))
	require.NoError(t, err)
	assert.Empty(t, left)
}
