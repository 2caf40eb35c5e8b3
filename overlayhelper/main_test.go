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
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// inNamespace is set in the environment of the tests that run in a mount
// namespace of their own.
const inNamespace = "GUEST_PULL_OVERLAYFS_TEST_NAMESPACE"

// noMounts says why there are no real mounts in this run, or is empty.
var noMounts string

// TestMain runs all tests once more inside a private mount namespace, where
// there are the rights for it. No mount can outlive it or be seen outside.
func TestMain(m *testing.M) {
	if os.Getenv(inNamespace) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Args[0] = os.Args[0]
		cmd.Env = append(os.Environ(), inNamespace+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		err := cmd.Start()
		if err == nil {
			err = cmd.Wait()
			var exit *exec.ExitError
			if err == nil || errors.As(err, &exit) {
				os.Exit(cmd.ProcessState.ExitCode())
			}
		}
		noMounts = "needs root and the right to make a mount namespace: " + err.Error()
	}
	code := m.Run()
	if dir := binaryDir; dir != "" {
		os.RemoveAll(dir)
	}
	os.Exit(code)
}

// needMounts skips a test where mounting is not possible.
func needMounts(t *testing.T) {
	t.Helper()
	if noMounts != "" {
		t.Skip(noMounts)
	}
}

// scratch gives a directory on a tmpfs of its own, so that results do not
// depend on the file system of the temporary directory.
func scratch(t *testing.T) string {
	t.Helper()
	needMounts(t)
	// Not t.TempDir, which puts a subtest's name into the path, commas too.
	dir, err := os.MkdirTemp("", "guest-pull-overlayfs-test-") //nolint:usetesting
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, os.Remove(dir)) })
	require.NoError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, ""))
	t.Cleanup(func() {
		// Mounts below go with it.
		require.NoError(t, unix.Unmount(dir, unix.MNT_DETACH))
	})
	return dir
}

// mkdir makes directories below dir, and gives their paths.
func mkdir(t *testing.T, dir string, names ...string) []string {
	t.Helper()
	paths := make([]string, len(names))
	for i, n := range names {
		paths[i] = filepath.Join(dir, n)
		require.NoError(t, os.MkdirAll(paths[i], 0o755))
	}
	return paths
}

func write(t *testing.T, path, content string) {
	t.Helper()
	require.NoError(t, os.WriteFile(path, []byte(content), 0o644))
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	require.NoError(t, err)
	return string(content)
}

// mountInfo gives the line of /proc/self/mountinfo for the topmost mount on
// target, as options of the mount, type, source and options of the file
// system; or nothing if nothing is mounted there.
func mountInfo(t *testing.T, target string) []string {
	t.Helper()
	target = strings.NewReplacer(`\`, `\134`, " ", `\040`, "\t", `\011`, "\n", `\012`).Replace(target)
	var found []string
	for line := range strings.SplitSeq(strings.TrimSpace(read(t, "/proc/self/mountinfo")), "\n") {
		mount, fs, ok := strings.Cut(line, " - ")
		require.True(t, ok, line)
		if f := strings.Fields(mount); f[4] == target {
			found = append([]string{f[5]}, strings.Fields(fs)...)
		}
	}
	return found
}

var binaryDir string

var buildBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "guest-pull-overlayfs-test-") //nolint:usetesting
	if err != nil {
		return "", err
	}
	binaryDir = dir
	// Other users have to reach it.
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	path := filepath.Join(dir, "nydus-overlayfs-guest-pull")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X main.version=1.2.3-test", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", errors.New(err.Error() + ": " + string(out))
	}
	return path, nil
})

// binary gives the path of the program, built as it is released, under the
// name that Kata's shims know.
func binary(t *testing.T) string {
	t.Helper()
	path, err := buildBinary()
	require.NoError(t, err)
	return path
}

// result is what a program did.
type result struct {
	code           int
	stdout, stderr string
}

func runCommand(t *testing.T, cmd *exec.Cmd) result {
	t.Helper()
	// What is built for the machine that an emulator makes of this one runs in it, too.
	if emulator := os.Getenv("GUEST_PULL_EMULATOR"); emulator != "" && filepath.Dir(cmd.Path) == binaryDir {
		path, err := exec.LookPath(emulator)
		require.NoError(t, err)
		cmd.Path, cmd.Args = path, append([]string{path, cmd.Path}, cmd.Args[1:]...)
	}
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		require.NoError(t, err)
	}
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}
