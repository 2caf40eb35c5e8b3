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
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/snapshotter"
)

// helper measures the mount helper as containerd runs it (containerd,
// core/mount/mount_linux.go, mountWithHelper).
func (b *bench) helper(ctx context.Context) (err error) {
	b.begin("The mount helper")
	program := filepath.Join(b.binaries.ours, "guest-pull-overlayfs")
	fuse, err := exec.LookPath("mount.fuse")
	if err != nil {
		if fuse, err = exec.LookPath("mount.fuse3"); err != nil {
			return fmt.Errorf("mount.fuse is not in PATH: install the package fuse3: %w", err)
		}
	}
	dir, err := os.MkdirTemp(b.dir, "helper-")
	if err != nil {
		return err
	}
	target := filepath.Join(dir, "target")
	if err := os.Mkdir(target, 0o755); err != nil {
		return err
	}
	s, err := snapshotter.New(ctx, filepath.Join(dir, "root"), snapshotter.Config{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	mounts, err := s.Prepare(ctx, "k8s.io/1/container", newImage("helper", layersPerImage).top())
	if err != nil {
		return err
	}
	options := mounts[0].Options
	plain := strings.Join(options[:len(options)-1], ",") // without the volume for the guest

	throughFuse := func(helper string) func() (float64, error) {
		args := []string{"overlay", target}
		for _, o := range options {
			args = append(args, "-o", o)
		}
		return func() (float64, error) { return timed(run(fuse, append(args, "-t", helper)...)) }
	}
	mounting := func(mount func() (float64, error)) func() (float64, error) {
		return func() (float64, error) {
			took, err := mount()
			if err != nil {
				return 0, err
			}
			return took, unix.Unmount(target, 0)
		}
	}
	r, err := interleave(ctx, b.scale.helperRounds,
		contender{guestPull, mounting(throughFuse(program))},
		contender{"mount", mounting(func() (float64, error) {
			return timed(run("mount", "-t", "overlay", "-o", plain, "overlay", target))
		})},
		// What mount.fuse and its shell cost when the helper does nothing.
		contender{"true", throughFuse("true")},
	)
	if err != nil {
		return err
	}
	const what = "mount a container's root through mount.fuse and the helper"
	b.compare(what, "mount(8) of the same overlay", "s", r[guestPull], r["mount"], nil)
	b.compare(what, "mount(8), plus mount.fuse with a helper that does nothing", "s",
		r[guestPull], each(sum, r["mount"], r["true"]), addsAtMost("2 ms", 2e-3))

	size, err := fileSize(program)
	if err != nil {
		return err
	}
	empty, err := b.emptyProgram(ctx)
	if err != nil {
		return err
	}
	b.compare("size of the helper", "a Go program that does nothing", "B", series{size}, series{empty}, nil)
	return nil
}

func run(name string, args ...string) func() error {
	return func() error {
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(string(out)))
		}
		return err
	}
}

func fileSize(path string) (float64, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, err
	}
	return float64(info.Size()), nil
}

// emptyProgram returns the size of a program that does nothing, built with the
// flags of the helper.
func (b *bench) emptyProgram(ctx context.Context) (float64, error) {
	dir, err := os.MkdirTemp(b.dir, "empty-")
	if err != nil {
		return 0, err
	}
	source, binary := filepath.Join(dir, "main.go"), filepath.Join(dir, "empty")
	if err := os.WriteFile(source, []byte("package main\n\nfunc main() {}\n"), 0o600); err != nil {
		return 0, err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", binary, source)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build an empty program: %w: %s", err, out)
	}
	return fileSize(binary)
}
