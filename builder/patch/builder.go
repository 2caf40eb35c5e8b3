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
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
)

// stampName is the file in the copy that holds its result. It is written before
// the copy gets its name, so a copy that has one is complete.
const stampName = ".patched.json"

// builder makes the patched copy of one module.
type builder struct {
	module  string // path of the module to patch
	line    string // its minor version ("2.4"), or empty for the one in go.mod
	patches string // directory of common/ and vMAJOR.MINOR/, with NNNN-title.patch each
	out     string // directory for the copy, go.mod and go.sum; default: .build/vMAJOR.MINOR/patched
}

// result says what a copy was made from, and what is in it.
type result struct {
	// Key is a digest of everything that the copy and the go.mod were made from.
	Key string `json:"key"`
	// Version is the module's version, as pinned in the line's go.mod.
	Version string `json:"version"`
	// Patches are the names of the applied patches, without ".patch", in order.
	Patches []string `json:"patches"`
	// Packages are the directories of the Go files that the patches touch, as
	// patterns ("./internal/fsview"), sorted.
	Packages []string `json:"packages"`
}

// module is what is used of the go command's description of a module.
type module struct {
	Path    string
	Version string
	Dir     string
}

// build makes the copy, unless there is one already that was made from the same
// patches and versions. Several may run at the same time.
func (b builder) build(ctx context.Context) (*result, error) {
	l, err := b.find(ctx)
	if err != nil {
		return nil, err
	}
	if b.out == "" {
		b.out = filepath.Join(".build", l.minor, "patched")
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(b.out, ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()

	key, err := b.key(l)
	if err != nil {
		return nil, err
	}
	copyDir := filepath.Join(b.out, path.Base(moduleName(b.module)))
	if r := readStamp(copyDir); r != nil && r.Key == key && b.hasModfile() {
		return r, nil
	}

	r := &result{Key: key, Version: l.mod.Version}
	if err := b.makeCopy(ctx, l, copyDir, r); err != nil {
		return nil, err
	}
	return r, nil
}

// moduleName is a module's path without its major version suffix.
func moduleName(modulePath string) string {
	return regexp.MustCompile(`/v[0-9]+$`).ReplaceAllString(modulePath, "")
}

// line is what a copy is made from.
type line struct {
	modfile string   // pins the version
	mod     *module  // the module at that version
	minor   string   // "v2.4"
	patches []string // files, in order
}

// find finds the line's module and patches.
func (b builder) find(ctx context.Context) (line, error) {
	var (
		l   line
		err error
	)
	if l.modfile, err = b.modfile(); err != nil {
		return line{}, err
	}
	if l.mod, err = findModule(ctx, b.module, l.modfile); err != nil {
		return line{}, err
	}
	if l.minor, err = b.minor(l.mod); err != nil {
		return line{}, err
	}
	if l.patches, err = b.series(l.minor); err != nil {
		return line{}, err
	}
	return l, nil
}

// modfile returns the go.mod that pins the line: its own, next to its patches, if
// it has one, or else the main module's.
func (b builder) modfile() (string, error) {
	if b.line == "" {
		return "go.mod", nil
	}
	own := filepath.Join(b.patches, "v"+b.line, "go.mod")
	if _, err := os.Stat(own); err == nil {
		return own, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return "go.mod", nil
}

// minor returns the minor version that the module is of ("v2.4").
func (b builder) minor(mod *module) (string, error) {
	minor := regexp.MustCompile(`^v[0-9]+\.[0-9]+`).FindString(mod.Version)
	if minor == "" {
		return "", fmt.Errorf("%s has version %q, which names no minor version", b.module, mod.Version)
	}
	if b.line != "" && minor != "v"+b.line {
		return "", fmt.Errorf("there is no line %s: no go.mod in %s, and go.mod has %s@%s",
			b.line, filepath.Join(b.patches, "v"+b.line), b.module, mod.Version)
	}
	return minor, nil
}

func findModule(ctx context.Context, modulePath, modfile string) (*module, error) {
	list := func() (*module, error) {
		out, err := command(ctx, "", nil, "go", "list", "-m", "-modfile="+modfile, "-json", modulePath)
		if err != nil {
			return nil, err
		}
		m := &module{}
		if err := json.Unmarshal(out, m); err != nil {
			return nil, fmt.Errorf("read the output of go list: %w", err)
		}
		return m, nil
	}
	m, err := list()
	if err != nil {
		return nil, err
	}
	if m.Dir == "" {
		// It is not in the module cache yet.
		if _, err := command(ctx, "", nil, "go", "mod", "download", "-modfile="+modfile, modulePath); err != nil {
			return nil, err
		}
		if m, err = list(); err != nil {
			return nil, err
		}
	}
	if m.Dir == "" {
		return nil, fmt.Errorf("%s@%s is not in the module cache after go mod download", m.Path, m.Version)
	}
	return m, nil
}

// series returns the patches of a minor version, in order: those that all lines
// have in common, and its own.
func (b builder) series(minor string) ([]string, error) {
	var (
		files  []string
		number = map[string]string{}
	)
	for _, dir := range []string{filepath.Join(b.patches, "common"), filepath.Join(b.patches, minor)} {
		found, err := filepath.Glob(filepath.Join(dir, "*.patch"))
		if err != nil {
			return nil, err
		}
		for _, f := range found {
			n, _, _ := strings.Cut(filepath.Base(f), "-")
			if other, ok := number[n]; ok {
				return nil, fmt.Errorf("%s and %s have one number: a patch is in common or in a line, not in both", other, f)
			}
			number[n] = f
		}
		files = append(files, found...)
	}
	if _, err := os.Stat(filepath.Join(b.patches, minor)); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no patches for %s %s: %w; port the patches to it, or build without them", b.module, minor, err)
	} else if err != nil {
		return nil, err
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no patches for %s %s: neither common nor %s in %s has a file *.patch", b.module, minor, minor, b.patches)
	}
	slices.SortFunc(files, func(a, b string) int { return strings.Compare(filepath.Base(a), filepath.Base(b)) })
	return files, nil
}

// key digests what decides the content of the copy and of the go.mod.
func (b builder) key(l line) (string, error) {
	h := sha256.New()
	gosum := sumFile(l.modfile)
	// Count up when this command changes what it makes from the same input.
	fmt.Fprintf(h, "1 %s %s %s\n", l.mod.Path, l.mod.Version, l.mod.Dir)
	for _, name := range append([]string{l.modfile, gosum}, l.patches...) {
		data, err := os.ReadFile(name)
		if err != nil && (name != gosum || !errors.Is(err, fs.ErrNotExist)) {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s\n", name, len(data), data)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// sumFile is where the go command keeps the checksums for a go.mod.
func sumFile(modfile string) string { return strings.TrimSuffix(modfile, ".mod") + ".sum" }

func readStamp(copyDir string) *result {
	data, err := os.ReadFile(filepath.Join(copyDir, stampName))
	if err != nil {
		return nil
	}
	r := &result{}
	if json.Unmarshal(data, r) != nil {
		return nil
	}
	return r
}

func (b builder) hasModfile() bool {
	for _, name := range []string{"go.mod", "go.sum"} {
		if _, err := os.Stat(filepath.Join(b.out, name)); err != nil {
			return false
		}
	}
	return true
}

// makeCopy makes everything under another name first: whatever interrupts it, a
// copy with a stamp is complete and belongs to the go.mod next to it.
func (b builder) makeCopy(ctx context.Context, l line, copyDir string, r *result) (err error) {
	// What an interrupted run left. The lock is held, so nobody uses it.
	left, err := filepath.Glob(filepath.Join(b.out, ".stage-*"))
	if err != nil {
		return err
	}
	for _, dir := range left {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	stage, err := os.MkdirTemp(b.out, ".stage-")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(stage))
	}()

	// CopyFS makes the copy writable, which the module cache is not.
	dir := filepath.Join(stage, "copy")
	if err := os.CopyFS(dir, os.DirFS(l.mod.Dir)); err != nil {
		return fmt.Errorf("copy %s@%s: %w", l.mod.Path, l.mod.Version, err)
	}
	packages := map[string]struct{}{}
	for _, name := range l.patches {
		if err := apply(ctx, dir, name); err != nil {
			return fmt.Errorf("%s does not apply to %s@%s: %w", name, l.mod.Path, l.mod.Version, err)
		}
		touched, err := touchedFiles(ctx, dir, name)
		if err != nil {
			return err
		}
		for _, f := range touched {
			// A file that a later patch removes still names its package.
			if strings.HasSuffix(f, ".go") {
				packages["./"+path.Dir(f)] = struct{}{}
			}
		}
		r.Patches = append(r.Patches, strings.TrimSuffix(filepath.Base(name), ".patch"))
	}
	for p := range packages {
		if goFiles, err := filepath.Glob(filepath.Join(dir, p, "*.go")); err != nil {
			return err
		} else if len(goFiles) > 0 {
			r.Packages = append(r.Packages, p)
		}
	}
	slices.Sort(r.Packages)

	stamp, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, stampName), append(stamp, '\n'), 0o644); err != nil {
		return err
	}
	if err := b.writeModfile(ctx, l.modfile, stage, copyDir); err != nil {
		return err
	}

	// The old copy goes first and the new one comes last, so that no moment has
	// a stamped copy next to a go.mod that was not made for it.
	if err := os.Rename(copyDir, filepath.Join(stage, "old")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		if err := os.Rename(filepath.Join(stage, name), filepath.Join(b.out, name)); err != nil {
			return err
		}
	}
	return os.Rename(dir, copyDir)
}

// writeModfile writes a go.mod, and its go.sum, that differ from the line's only
// in using the copy.
func (b builder) writeModfile(ctx context.Context, modfile, stage, copyDir string) error {
	gomod, err := os.ReadFile(modfile)
	if err != nil {
		return err
	}
	gosum, err := os.ReadFile(sumFile(modfile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.WriteFile(filepath.Join(stage, "go.mod"), gomod, 0o644); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(stage, "go.sum"), gosum, 0o644); err != nil {
		return err
	}
	// The go command takes a relative path as relative to the main module. It is
	// recorded in the binary, which must not depend on where it was built.
	target := filepath.ToSlash(copyDir)
	if !filepath.IsAbs(copyDir) {
		target = "./" + path.Clean(target)
	}
	_, err = command(ctx, "", nil, "go", "mod", "edit", "-replace="+b.module+"="+target, filepath.Join(stage, "go.mod"))
	return err
}

// gitEnv keeps git from finding a repository around the copy, in which it would
// skip, without a word, all files that it takes for outside, and from reading
// configuration (apply.whitespace, core.autocrlf) that changes what is applied.
func gitEnv(dir string) ([]string, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, "GIT_")
	})
	return append(env,
		"GIT_CEILING_DIRECTORIES="+filepath.Dir(abs),
		"GIT_CONFIG_GLOBAL="+os.DevNull,
		"GIT_CONFIG_NOSYSTEM=1",
		"LC_ALL=C",
	), nil
}

func git(ctx context.Context, dir string, args ...string) ([]byte, error) {
	env, err := gitEnv(dir)
	if err != nil {
		return nil, err
	}
	return command(ctx, dir, env, "git", args...)
}

// apply applies a patch to the tree in dir, whole or not at all.
func apply(ctx context.Context, dir, patchFile string) error {
	abs, err := filepath.Abs(patchFile)
	if err != nil {
		return err
	}
	if _, err = git(ctx, dir, "apply", "--verbose", "--whitespace=nowarn", abs); err == nil {
		return nil
	}
	var failed *commandError
	if !errors.As(err, &failed) {
		return err
	}
	content, rerr := os.ReadFile(patchFile)
	if rerr != nil {
		return errors.Join(err, rerr)
	}
	if hunks := failedHunks(failed.stderr, content); len(hunks) > 0 {
		return fmt.Errorf("%s\n%s", strings.Join(hunks, "\n"), failed.stderr)
	}
	return err
}

var (
	patchFailed = regexp.MustCompile(`(?m)^error: patch failed: (.+):([0-9]+)$`)
	hunkHeader  = regexp.MustCompile(`^@@ -([0-9]+)(,[0-9]+)? \+`)
)

// failedHunks names the hunks that git apply complained about. Git only says
// which line of which file the hunk starts at.
func failedHunks(stderr string, patch []byte) []string {
	var hunks []string
	for _, failed := range patchFailed.FindAllStringSubmatch(stderr, -1) {
		var (
			file string
			n    int
		)
		for line := range strings.Lines(string(patch)) {
			line = strings.TrimRight(line, "\n")
			if old, ok := strings.CutPrefix(line, "--- a/"); ok {
				file, n = old, 0
				continue
			}
			m := hunkHeader.FindStringSubmatch(line)
			if m == nil {
				continue
			}
			n++
			if file == failed[1] && m[1] == failed[2] {
				hunks = append(hunks, fmt.Sprintf("%s: hunk #%d: %s", file, n, line))
			}
		}
	}
	return hunks
}

// touchedFiles returns the files that a patch changes, adds or removes.
func touchedFiles(ctx context.Context, dir, patchFile string) ([]string, error) {
	abs, err := filepath.Abs(patchFile)
	if err != nil {
		return nil, err
	}
	out, err := git(ctx, dir, "apply", "--numstat", "-z", abs)
	if err != nil {
		return nil, err
	}
	var files []string
	for line := range strings.SplitSeq(string(out), "\x00") {
		// added TAB removed TAB name
		if fields := strings.SplitN(line, "\t", 3); len(fields) == 3 {
			files = append(files, fields[2])
		}
	}
	return files, nil
}

// lock waits until nobody else works in the directory.
func lock(name string) (unlock func(), err error) {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	for {
		if err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX); !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	return func() { f.Close() }, nil
}

// commandError is a command that ran and failed.
type commandError struct {
	command string
	stderr  string
	err     error
}

func (e *commandError) Error() string {
	return fmt.Sprintf("%s: %v\n%s", e.command, e.err, e.stderr)
}

func (e *commandError) Unwrap() error { return e.err }

func command(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, error) {
	stdout, _, err := outputs(ctx, dir, env, name, args...)
	if err != nil {
		return nil, err
	}
	return stdout, nil
}

// outputs runs a command and returns what it writes, also when it fails.
func outputs(ctx context.Context, dir string, env []string, name string, args ...string) ([]byte, string, error) {
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, env
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if err != nil {
		line := strings.Join(append([]string{name}, args...), " ")
		if errors.Is(err, exec.ErrNotFound) {
			return nil, "", fmt.Errorf("%s: %w; install %s", line, err, name)
		}
		err = &commandError{command: line, stderr: strings.TrimSpace(stderr.String()), err: err}
	}
	return stdout.Bytes(), stderr.String(), err
}
