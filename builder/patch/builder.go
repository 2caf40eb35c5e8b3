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
	patches string // directory of vMAJOR.MINOR/NNNN-title.patch
	out     string // directory for the copy, go.mod and go.sum
}

// result says what a copy was made from, and what is in it.
type result struct {
	// Key is a digest of everything that the copy and the go.mod were made from.
	Key string `json:"key"`
	// Version is the module's version, as pinned in the main module's go.mod.
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
	mod, err := findModule(ctx, b.module)
	if err != nil {
		return nil, err
	}
	files, err := b.patchFiles(mod.Version)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(b.out, 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(filepath.Join(b.out, ".lock"))
	if err != nil {
		return nil, err
	}
	defer unlock()

	key, err := b.key(mod, files)
	if err != nil {
		return nil, err
	}
	copyDir := filepath.Join(b.out, path.Base(moduleName(b.module)))
	if r := readStamp(copyDir); r != nil && r.Key == key && b.hasModfile() {
		return r, nil
	}

	r := &result{Key: key, Version: mod.Version}
	if err := b.makeCopy(ctx, mod, files, copyDir, r); err != nil {
		return nil, err
	}
	return r, nil
}

// moduleName is a module's path without its major version suffix.
func moduleName(modulePath string) string {
	return regexp.MustCompile(`/v[0-9]+$`).ReplaceAllString(modulePath, "")
}

func findModule(ctx context.Context, modulePath string) (*module, error) {
	list := func() (*module, error) {
		out, err := command(ctx, "", nil, "go", "list", "-m", "-json", modulePath)
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
		if _, err := command(ctx, "", nil, "go", "mod", "download", modulePath); err != nil {
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

// patchFiles returns the patches for the version's minor version, in order.
func (b builder) patchFiles(version string) ([]string, error) {
	minor := regexp.MustCompile(`^v[0-9]+\.[0-9]+`).FindString(version)
	if minor == "" {
		return nil, fmt.Errorf("%s has version %q, which names no minor version", b.module, version)
	}
	dir := filepath.Join(b.patches, minor)
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("no patches for %s@%s: %w; port the patches to %s, or build without them", b.module, version, err, minor)
	} else if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		if strings.HasSuffix(e.Name(), ".patch") {
			files = append(files, filepath.Join(dir, e.Name()))
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("no patches for %s@%s: %s has no file *.patch", b.module, version, dir)
	}
	slices.Sort(files)
	return files, nil
}

// key digests what decides the content of the copy and of the go.mod.
func (b builder) key(mod *module, patchFiles []string) (string, error) {
	h := sha256.New()
	// Count up when this command changes what it makes from the same input.
	fmt.Fprintf(h, "1 %s %s %s\n", mod.Path, mod.Version, mod.Dir)
	for _, name := range append([]string{"go.mod", "go.sum"}, patchFiles...) {
		data, err := os.ReadFile(name)
		if err != nil && (name != "go.sum" || !errors.Is(err, fs.ErrNotExist)) {
			return "", err
		}
		fmt.Fprintf(h, "%s %d\n%s\n", name, len(data), data)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

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
func (b builder) makeCopy(ctx context.Context, mod *module, patchFiles []string, copyDir string, r *result) (err error) {
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
	if err := os.CopyFS(dir, os.DirFS(mod.Dir)); err != nil {
		return fmt.Errorf("copy %s@%s: %w", mod.Path, mod.Version, err)
	}
	packages := map[string]struct{}{}
	for _, name := range patchFiles {
		if err := apply(ctx, dir, name); err != nil {
			return fmt.Errorf("%s does not apply to %s@%s: %w", name, mod.Path, mod.Version, err)
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
	if err := b.writeModfile(ctx, stage, copyDir); err != nil {
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

// writeModfile writes a go.mod, and its go.sum, that differ from the main
// module's only in using the copy.
func (b builder) writeModfile(ctx context.Context, stage, copyDir string) error {
	gomod, err := os.ReadFile("go.mod")
	if err != nil {
		return err
	}
	gosum, err := os.ReadFile("go.sum")
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
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir, cmd.Env = dir, env
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		line := strings.Join(append([]string{name}, args...), " ")
		if errors.Is(err, exec.ErrNotFound) {
			return nil, fmt.Errorf("%s: %w; install %s", line, err, name)
		}
		return nil, &commandError{command: line, stderr: strings.TrimSpace(stderr.String()), err: err}
	}
	return stdout.Bytes(), nil
}
