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
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// attempt is how one patch went on a version that it may not be made for.
type attempt struct {
	patch    string
	offsets  int      // hunks that were found on other lines
	conflict []string // hunks that were not found, or why it does not apply at all
	build    string   // what the compiler says; empty: it builds
	tests    []string // the tests that the patch adds or changes
	failure  string   // what they say; empty: they pass
	without  string   // how they go without the rest of the patch: see the constants
}

const (
	failWithout    = "fail without"
	noBuildWithout = "do not build without"
	passWithout    = "**pass without**" // so that they show nothing
)

func (a attempt) ok() bool {
	return len(a.conflict) == 0 && a.build == "" && a.failure == "" && a.without != passWithout
}

// errTry says that a patch needs work.
var errTry = errors.New("the patches have to be worked on")

// try applies a series to any version of the module, one patch after the other, and
// builds and tests what each one touches. One that conflicts is left out, and the
// rest is tried without it. The series is that of the version's own line, if there
// is one, or else of b.line. The copy stays in b.out, by default .build/try/VERSION.
func (b builder) try(ctx context.Context, version string, w io.Writer) error {
	mod, err := download(ctx, b.module, version)
	if err != nil {
		return err
	}
	if minor, err := (builder{module: b.module}).minor(mod); err != nil {
		return err
	} else if _, err := os.Stat(filepath.Join(b.patches, minor)); err == nil {
		b.line = strings.TrimPrefix(minor, "v")
	}
	l, err := b.find(ctx)
	if err != nil {
		return err
	}
	if b.out == "" {
		b.out = filepath.Join(".build", "try", version)
	}
	dir := filepath.Join(b.out, path.Base(moduleName(b.module)))
	if err := errors.Join(os.RemoveAll(dir), os.MkdirAll(b.out, 0o755)); err != nil {
		return err
	}
	if err := os.CopyFS(dir, os.DirFS(mod.Dir)); err != nil {
		return fmt.Errorf("copy %s@%s: %w", mod.Path, mod.Version, err)
	}
	fmt.Fprintf(w, "%s@%s, with the patches of %s, in %s\n\n", mod.Path, mod.Version, l.minor, dir)
	fmt.Fprintf(w, "| patch | applies | builds | its tests |\n|---|---|---|---|\n")
	var attempts []attempt
	for _, p := range l.patches {
		a, err := tryPatch(ctx, dir, p)
		if err != nil {
			return err
		}
		attempts = append(attempts, a)
		fmt.Fprintln(w, a.row())
	}
	return report(w, attempts)
}

// download gets a version of a module that go.mod does not name. With -json the go
// command says there, and not on standard error, what went wrong.
func download(ctx context.Context, modulePath, version string) (*module, error) {
	out, _, err := outputs(ctx, "", nil, "go", "mod", "download", "-json", modulePath+"@"+version)
	m := struct {
		module
		Error string
	}{}
	if jsonErr := json.Unmarshal(out, &m); err == nil && jsonErr != nil {
		return nil, fmt.Errorf("read the output of go mod download: %w", jsonErr)
	}
	if m.Error != "" {
		return nil, fmt.Errorf("go mod download: %s", m.Error)
	}
	return &m.module, err
}

var offsetHunk = regexp.MustCompile(`(?m)^Hunk #[0-9]+ succeeded at `)

// tryPatch applies a patch to the tree in dir, and builds and tests the packages
// that it touches. An error is of the machine, not of the patch.
func tryPatch(ctx context.Context, dir, patchFile string) (attempt, error) {
	a := attempt{patch: strings.TrimSuffix(filepath.Base(patchFile), ".patch")}
	abs, err := filepath.Abs(patchFile)
	if err != nil {
		return a, err
	}
	content, err := os.ReadFile(patchFile)
	if err != nil {
		return a, err
	}
	touched, err := touchedFiles(ctx, dir, patchFile)
	if err != nil {
		return a, err
	}
	a.tests = testsOf(content)
	if a.without, err = tryTestsAlone(ctx, dir, abs, touched, a.tests); err != nil {
		return a, err
	}
	said, err := gitSays(ctx, dir, "apply", "--verbose", "--whitespace=nowarn", abs)
	var failed *commandError
	if errors.As(err, &failed) {
		if a.conflict = failedHunks(failed.stderr, content); len(a.conflict) == 0 {
			for line := range strings.Lines(failed.stderr) {
				if reason, ok := strings.CutPrefix(line, "error: "); ok {
					a.conflict = append(a.conflict, strings.TrimSpace(reason))
				}
			}
		}
		return a, nil
	} else if err != nil {
		return a, err
	}
	a.offsets = len(offsetHunk.FindAllString(said, -1))

	packages, err := packagesOf(dir, touched)
	if err != nil {
		return a, err
	}
	if len(packages) == 0 {
		return a, nil
	}
	// Everything may use what a patch touches: all of it is built, and what is
	// touched with its tests.
	for _, args := range [][]string{{"build", "./..."}, append([]string{"test", "-run=^$"}, packages...)} {
		if a.build, err = goSays(ctx, dir, args...); err != nil || a.build != "" {
			return a, err
		}
	}
	if len(a.tests) == 0 {
		return a, nil
	}
	a.failure, err = goTest(ctx, dir, a.tests, packages)
	return a, err
}

// packagesOf returns the packages in dir that files are in.
func packagesOf(dir string, files []string) (packages []string, err error) {
	for _, f := range files {
		p := "./" + path.Dir(f)
		if strings.HasSuffix(f, ".go") && !slices.Contains(packages, p) {
			if found, err := filepath.Glob(filepath.Join(dir, p, "*.go")); err != nil {
				return nil, err
			} else if len(found) > 0 {
				packages = append(packages, p)
			}
		}
	}
	return packages, nil
}

// tryTestsAlone applies nothing but the tests of a patch, and says how they go. It
// leaves the tree as it was.
func tryTestsAlone(ctx context.Context, dir, patchFile string, touched, tests []string) (string, error) {
	if len(tests) == 0 {
		return "", nil
	}
	apply := []string{"apply", "--include=*_test.go", "--whitespace=nowarn", patchFile}
	var failed *commandError
	if _, err := gitSays(ctx, dir, apply...); errors.As(err, &failed) {
		return "", nil // The patch itself will not apply, and says why.
	} else if err != nil {
		return "", err
	}
	packages, err := packagesOf(dir, slices.DeleteFunc(slices.Clone(touched), func(f string) bool { return !strings.HasSuffix(f, "_test.go") }))
	if err != nil {
		return "", err
	}
	said, err := goTest(ctx, dir, tests, packages)
	if err != nil {
		return "", err
	}
	if _, err := gitSays(ctx, dir, append(apply, "--reverse")...); err != nil {
		return "", err
	}
	switch {
	case said == "":
		return passWithout, nil
	case strings.Contains(said, "--- FAIL: "):
		return failWithout, nil
	}
	return noBuildWithout, nil
}

func goTest(ctx context.Context, dir string, tests, packages []string) (string, error) {
	return goSays(ctx, dir, append([]string{"test", "-count=1", "-run=^(" + strings.Join(tests, "|") + ")$"}, packages...)...)
}

// gitSays runs git and returns what it says on standard error when it succeeds.
func gitSays(ctx context.Context, dir string, args ...string) (string, error) {
	env, err := gitEnv(dir)
	if err != nil {
		return "", err
	}
	_, stderr, err := outputs(ctx, dir, env, "git", args...)
	return stderr, err
}

// goSays runs the go command in the copy, and returns what it says if it fails.
func goSays(ctx context.Context, dir string, args ...string) (string, error) {
	// Not what builds the main module.
	env := append(os.Environ(), "GOFLAGS=", "GOWORK=off")
	stdout, stderr, err := outputs(ctx, dir, env, "go", args...)
	var failed *commandError
	if errors.As(err, &failed) && ctx.Err() == nil {
		return strings.TrimSpace(string(stdout) + stderr), nil
	}
	return "", err
}

var (
	newFile  = regexp.MustCompile(`^\+\+\+ b/(.*_test\.go)$`)
	newRange = regexp.MustCompile(`^@@ -\S+ \+([0-9]+)(?:,([0-9]+))? @@`)
	testFunc = regexp.MustCompile(`^func (Test[A-Za-z0-9_]*)\(`)
)

// testsOf returns the tests that a patch adds lines to. It reads them from the
// patch itself: the lines say so, or the function that git names for a hunk.
func testsOf(patch []byte) []string {
	var (
		tests  []string
		inTest bool
		last   string
	)
	for line := range strings.Lines(string(patch)) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "diff --git "):
			inTest, last = false, ""
		case newFile.MatchString(line):
			inTest = true
		case !inTest:
		case newRange.MatchString(line):
			last = ""
			_, after, _ := strings.Cut(line[2:], "@@")
			if m := testFunc.FindStringSubmatch(strings.TrimSpace(after)); m != nil {
				last = m[1]
			}
		case strings.HasPrefix(line, "+"), strings.HasPrefix(line, " "):
			if m := testFunc.FindStringSubmatch(line[1:]); m != nil {
				last = m[1]
			}
			if line[0] == '+' && last != "" && !slices.Contains(tests, last) {
				tests = append(tests, last)
			}
		}
	}
	return tests
}

// row is a line of a table.
func (a attempt) row() string {
	cells := []string{a.patch, "yes", "yes", fmt.Sprintf("pass (%d), %s", len(a.tests), a.without)}
	if a.offsets > 0 {
		cells[1] = fmt.Sprintf("with an offset (%d hunks)", a.offsets)
	}
	switch {
	case len(a.conflict) > 0:
		cells[1], cells[2], cells[3] = fmt.Sprintf("**conflicts** (%d hunks)", len(a.conflict)), "", ""
	case a.build != "":
		cells[2], cells[3] = "**no**", ""
	case a.failure != "":
		cells[3] = "**fail**"
	case len(a.tests) == 0:
		cells[3] = "none"
	}
	return "| " + strings.Join(cells, " | ") + " |"
}

// report says what is wrong with each patch that needs work.
func report(w io.Writer, attempts []attempt) error {
	var bad int
	for _, a := range attempts {
		if a.ok() {
			continue
		}
		bad++
		fmt.Fprintf(w, "\n%s\n", a.patch)
		for _, text := range append(slices.Clone(a.conflict), a.build, a.failure) {
			for line := range strings.Lines(text) {
				fmt.Fprintln(w, "    "+strings.TrimRight(line, "\n"))
			}
		}
	}
	if bad > 0 {
		return fmt.Errorf("%w: %d of %d", errTry, bad, len(attempts))
	}
	return nil
}
