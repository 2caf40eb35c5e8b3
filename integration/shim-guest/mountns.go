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
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// guestDir is the mount point of the guest's tmpfs, in the bundle of the first
// container of the shim, which is the server's working directory. Should the
// host remove that directory while the shim is alive, the kernel detaches the
// tmpfs here.
const guestDir = "guest"

// enterGuest moves the process into a mount namespace of its own with a tmpfs at
// guestDir, and executes the program again there: a process that has threads
// cannot change the mount namespace of all of them otherwise.
func enterGuest() error {
	runtime.LockOSThread()
	if err := os.Setenv(stageEnv, stageInside); err != nil {
		return err
	}
	if err := os.Mkdir(guestDir, 0o700); err != nil && !os.IsExist(err) {
		return fmt.Errorf("make the guest's directory: %w", err)
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make the guest's mount namespace (needs root): %w", err)
	}
	// Slave and not private: what the host mounts later for a container, a
	// volume for instance, has to be found here.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep the guest's mounts from the host: %w", err)
	}
	if err := unix.Mount("guest", guestDir, "tmpfs", unix.MS_NODEV, "mode=0700"); err != nil {
		return fmt.Errorf("mount the guest's tmpfs: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if err := syscall.Exec(self, os.Args, os.Environ()); err != nil {
		return fmt.Errorf("execute %s in the guest: %w", self, err)
	}
	return nil
}

// insideGuest returns the guest's directory, after a check that the process is
// where enterGuest should have brought it.
func insideGuest() (string, error) {
	if os.Getenv(stageEnv) != stageInside {
		return "", fmt.Errorf("the stand-in guest serves only when containerd starts it: %s is not set", stageEnv)
	}
	// Not for the children.
	if err := os.Unsetenv(stageEnv); err != nil {
		return "", err
	}
	cwd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cwd, guestDir)
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return "", fmt.Errorf("look at the guest's tmpfs: %w", &os.PathError{Op: "statfs", Path: dir, Err: err})
	}
	if fs.Type != unix.TMPFS_MAGIC {
		return "", fmt.Errorf("the guest's directory %s is not a tmpfs", dir)
	}
	return dir, nil
}

// logToContainerd writes an error to where containerd reads the shim's log. The
// server's own stderr goes nowhere before the shim library has opened that file.
func logToContainerd(err error) {
	f, oerr := os.OpenFile("log", os.O_WRONLY|unix.O_NONBLOCK, 0)
	if oerr != nil {
		return
	}
	defer f.Close()
	fmt.Fprintf(f, "time=%q level=error msg=%q runtime=%s\n", time.Now().Format(time.RFC3339Nano), err, runtimeName)
}
