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
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
)

// The suites use fixed paths, fixed host names and fixed process names, and end
// processes by name. So each run has a machine of its own, as far as namespaces
// can make one: processes, mounts, network, host name and cgroups. Nothing of it
// is left when its first process ends.

// stageEnv tells the program how far into the sandbox it is.
const stageEnv = "GUEST_PULL_UPSTREAM_STAGE"

const (
	stageFirst  = "first"  // process 1: prepares the sandbox, starts the next, reaps
	stageInside = "inside" // runs the suite
)

// sandboxed runs this program again, inside. Its directory holds what the suite
// leaves on disk and is empty afterwards.
func sandboxed(ctx context.Context, dir string, args []string, log *os.File) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cgroup := fmt.Sprintf("gp-upstream-%d", os.Getpid())
	if err := makeCgroups(cgroup); err != nil {
		return errors.Join(err, removeCgroups(cgroup))
	}
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Env = append(os.Environ(), stageEnv+"="+stageFirst, "GUEST_PULL_UPSTREAM_DIR="+dir, "GUEST_PULL_UPSTREAM_CGROUP="+cgroup)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		Pdeathsig:  syscall.SIGKILL,
	}
	cmd.Cancel = func() error {
		return errors.Join(cmd.Process.Kill(), thaw(cgroup))
	}
	err = cmd.Run()
	return errors.Join(err, removeCgroups(cgroup), os.RemoveAll(dir))
}

// cgroupMounts are the hierarchies: one for version 2, several for version 1.
func cgroupMounts() ([]*mountinfo.Info, error) {
	return mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup", "cgroup2"))
}

func makeCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := os.Mkdir(filepath.Join(m.Mountpoint, name), 0o755); err != nil {
			return err
		}
		// A cpuset of version 1 takes no process before it has these.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(m.Mountpoint, f)); err == nil && m.FSType == "cgroup" {
				if err := os.WriteFile(filepath.Join(m.Mountpoint, name, f), b, 0o644); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

func removeCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		// The processes of the sandbox are dead; the kernel may need a moment.
		for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(100 * time.Millisecond) {
			err = harness.RemoveCgroup(filepath.Join(m.Mountpoint, name))
			if err == nil || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// thaw thaws all that a case has left frozen: it could not die with the sandbox,
// which would wait for it for ever.
func thaw(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		err = errors.Join(err, filepath.WalkDir(filepath.Join(m.Mountpoint, name), func(path string, d fs.DirEntry, err error) error {
			switch {
			case errors.Is(err, fs.ErrNotExist):
				return nil // removed meanwhile
			case err != nil:
				return err
			case d.Name() == "freezer.state": // version 1
				err = os.WriteFile(path, []byte("THAWED"), 0o644)
			case d.Name() == "cgroup.freeze" && m.FSType == "cgroup2":
				err = os.WriteFile(path, []byte("0"), 0o644)
			}
			// The root of a hierarchy has such a file and cannot be written, nor can that of a
			// namespace where systemd has mounted the hierarchy (nsdelegate).
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EPERM) {
				return nil
			}
			return err
		}))
	}
	return err
}

// enterCgroups makes the sandbox's cgroup the root of what it sees.
func enterCgroups(name string) error {
	mounts, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if err := os.WriteFile(filepath.Join(m.Mountpoint, name, "cgroup.procs"), []byte("0"), 0o644); err != nil {
			return err
		}
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a cgroup namespace: %w", err)
	}
	for _, m := range mounts {
		// A mount made in a cgroup namespace begins at the namespace's root.
		options := slices.DeleteFunc(strings.Split(m.VFSOptions, ","), func(o string) bool {
			return o == "rw" || o == "ro" || (m.FSType == "cgroup2" && o == "memory_recursiveprot")
		})
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount the host's cgroup %s: %w", m.Mountpoint, err)
		}
		if err := unix.Mount("cgroup", m.Mountpoint, m.FSType, 0, strings.Join(options, ",")); err != nil {
			return fmt.Errorf("mount the sandbox's cgroup at %s: %w", m.Mountpoint, err)
		}
	}
	if len(mounts) == 1 {
		// In version 2, a cgroup with processes cannot share out controllers.
		if err := os.Mkdir("/sys/fs/cgroup/init", 0o755); err != nil {
			return err
		}
		if err := os.WriteFile("/sys/fs/cgroup/init/cgroup.procs", []byte("0"), 0o644); err != nil {
			return err
		}
		controllers, err := os.ReadFile("/sys/fs/cgroup/cgroup.controllers")
		if err != nil {
			return err
		}
		for c := range strings.FieldsSeq(string(controllers)) {
			if err := os.WriteFile("/sys/fs/cgroup/cgroup.subtree_control", []byte("+"+c), 0o644); err != nil {
				return fmt.Errorf("share out the cgroup controller %s: %w", c, err)
			}
		}
	}
	return nil
}

// first is process 1 of the sandbox.
func first(hosts []string) error {
	// Namespaces that are entered from here on are the thread's, and what is started
	// has those of the thread that starts it.
	runtime.LockOSThread()
	dir := os.Getenv("GUEST_PULL_UPSTREAM_DIR")
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep the sandbox's mounts to itself: %w", err)
	}
	// Among themselves they are shared, as systemd has it.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make the sandbox's mounts shared: %w", err)
	}
	if err := enterCgroups(os.Getenv("GUEST_PULL_UPSTREAM_CGROUP")); err != nil {
		return err
	}
	// On disk, and not on a tmpfs: overlayfs behaves differently there.
	for _, name := range []string{"/tmp", "/run", "/var/lib", "/opt"} {
		private := filepath.Join(dir, filepath.Base(name))
		if err := os.Mkdir(private, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(private, name, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("give the sandbox a %s of its own: %w", name, err)
		}
	}
	if err := os.Chmod("/tmp", os.ModeSticky|0o777); err != nil {
		return err
	}
	// The same for /etc, where CNI's configuration is looked for and the
	// registry's hosts get their address.
	etc := filepath.Join(dir, "etc")
	if out, err := exec.Command("cp", "-a", "/etc", etc).CombinedOutput(); err != nil {
		return fmt.Errorf("copy /etc for the sandbox: %w: %s", err, out)
	}
	if err := unix.Mount(etc, "/etc", "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("give the sandbox an /etc of its own: %w", err)
	}
	text := "127.0.0.1 localhost " + strings.Join(hosts, " ") + "\n"
	if err := os.WriteFile("/etc/hosts", []byte(text), 0o644); err != nil {
		return fmt.Errorf("name the registry's hosts: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
		return fmt.Errorf("bring up the sandbox's loopback: %w: %s", err, out)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), stageEnv+"="+stageInside)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	// Orphans come to process 1.
	signal.Ignore(syscall.SIGINT, syscall.SIGTERM)
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, 0, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if pid == cmd.Process.Pid {
			if err := thaw("."); err != nil {
				fmt.Fprintln(os.Stderr, "upstream:", err)
			}
			os.Exit(status.ExitStatus()) // and with it, everything else
		}
	}
}
