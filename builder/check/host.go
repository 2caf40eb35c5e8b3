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

package check

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Host is the machine, as far as the checks look at it.
type Host struct {
	// Root is put before every path; "" is the machine itself.
	Root string
	// Path are the directories in which containerd finds programs, and
	// PathSource says where they are known from.
	Path       []string
	PathSource string
	// Env is containerd's environment.
	Env map[string]string
	// Exec runs a program and returns what it prints; nil runs it for real,
	// for a few seconds at most.
	Exec func(ctx context.Context, path string, args ...string) (string, error)
}

const execTimeout = 5 * time.Second

func (h Host) exec(ctx context.Context, path string, args ...string) (string, error) {
	if h.Exec != nil {
		return h.Exec(ctx, path, args...)
	}
	ctx, cancel := context.WithTimeout(ctx, execTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.join(path), args...)
	cmd.Env = []string{"PATH=" + strings.Join(h.Path, ":")}
	cmd.Dir = "/"
	// A child that keeps the output open must not keep the check.
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (h Host) join(path string) string { return filepath.Join(h.Root, path) }

// same says whether two paths lead to one file.
func (h Host) same(a, b string) bool {
	infoA, errA := os.Stat(h.join(a))
	infoB, errB := os.Stat(h.join(b))
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}

func (h Host) exists(path string) bool {
	_, err := os.Stat(h.join(path))
	return err == nil
}

func (h Host) read(path string) ([]byte, error) { return os.ReadFile(h.join(path)) }

// glob is filepath.Glob on the host.
func (h Host) glob(pattern string) []string {
	found, err := filepath.Glob(h.join(pattern))
	if err != nil {
		return nil
	}
	for i, f := range found {
		found[i] = strings.TrimPrefix(f, strings.TrimSuffix(h.Root, "/"))
	}
	return found
}

// lookPath finds a program as exec.LookPath does in containerd.
func (h Host) lookPath(name string) string {
	candidates := []string{name}
	if !strings.Contains(name, "/") {
		candidates = nil
		for _, dir := range h.Path {
			candidates = append(candidates, filepath.Join(dir, name))
		}
	}
	for _, c := range candidates {
		info, err := os.Stat(h.join(c))
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return c
		}
	}
	return ""
}

// nearest returns a directory, or that parent of it which exists.
func (h Host) nearest(dir string) string {
	for dir != "/" && !h.exists(dir) {
		dir = filepath.Dir(dir)
	}
	return dir
}

// usable says why a directory cannot hold an overlayfs's directories, or nil.
func (h Host) usable(dir string) error {
	path := h.join(dir)
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(path, &fs); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	if fs.Flags&unix.ST_RDONLY != 0 {
		return fmt.Errorf("%s is on a read-only file system", dir)
	}
	if err := unix.Access(path, unix.W_OK); err != nil {
		return fmt.Errorf("%s cannot be written: %w", dir, err)
	}
	typed, err := hasTypes(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", dir, err)
	}
	if !typed {
		return fmt.Errorf("%s is on a file system without d_type, which overlayfs needs", dir)
	}
	return nil
}

// hasTypes says whether a directory's entries have types. It needs no entry of
// its own: each directory has the entries for itself and its parent.
func hasTypes(dir string) (bool, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	b := make([]byte, 4096)
	n, err := unix.Getdents(fd, b)
	if err != nil {
		return false, err
	}
	// struct linux_dirent64, getdents64(2): the record's length is at 16, the
	// type at 18.
	for b = b[:n]; len(b) > 19; {
		if b[18] != unix.DT_UNKNOWN {
			return true, nil
		}
		length := int(b[16]) | int(b[17])<<8
		if length < 19 || length > len(b) {
			return false, errors.New("malformed directory entry")
		}
		b = b[length:]
	}
	return false, nil
}

// locked says whether another process has a lock on a file, as bbolt takes one on
// its database.
func (h Host) locked(path string) bool {
	fd, err := unix.Open(h.join(path), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	return errors.Is(unix.Flock(fd, unix.LOCK_SH|unix.LOCK_NB), unix.EWOULDBLOCK)
}
