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
	"errors"
	"os"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// The parameters that add one layer each. The kernel takes them only through
// fsconfig(2), and not every kernel that has overlayfs has them.
const (
	lowerKey = "lowerdir+"
	dataKey  = "datadir+"
)

// maxParameter is the longest key or value that fsconfig(2) copies in, without
// the zero byte at the end (fs/fsopen.c, FSCONFIG_SET_STRING).
const maxParameter = 255

// failure is a mount that the kernel refused.
type failure struct {
	err error
	// doing says which step it was, where it was not the mount itself.
	doing string
	// option is the one that the kernel refused, where that is known.
	option string
	// log is what the kernel wrote about it into the file system context.
	log string
}

// mountIn mounts o in a mount namespace, or in the caller's own if namespace is
// empty. It returns an error that names the target and, if known, the reason.
//
// The work is done on a thread that ends with it, because it may have to give
// the thread a working directory or a mount namespace of its own.
func mountIn(namespace string, o *overlay, open contextOpener) error {
	if !o.isAbsolute() {
		cwd, err := os.Getwd()
		if err != nil {
			return errors.New(show(o.target) + ": mounting overlay: relative paths, and no working directory: " + errnoText(err))
		}
		o = o.absolute(cwd)
	}

	done := make(chan error)
	go func() {
		// Never unlocked: the runtime then ends the thread with the goroutine.
		runtime.LockOSThread()
		if err := enterNamespace(namespace); err != nil {
			done <- errors.New(show(o.target) + ": entering mount namespace " + show(namespace) + ": " + errnoText(err))
			return
		}
		f := mountOverlay(o, open)
		if f == nil {
			done <- nil
			return
		}
		message := show(o.target) + ": mounting overlay: "
		if f.doing != "" {
			message += f.doing + ": "
		}
		message += errnoText(f.err)
		// The reason is looked for here, where paths mean what they meant
		// to the mount.
		if why := reason(o, f); why != "" {
			message += ": " + why
		}
		done <- errors.New(message)
	}()
	return <-done
}

// enterNamespace moves the calling thread to a mount namespace.
func enterNamespace(namespace string) error {
	if namespace == "" {
		return nil
	}
	if strings.Trim(namespace, "0123456789") == "" {
		namespace = "/proc/" + namespace + "/ns/mnt"
	}
	fd, err := unix.Open(namespace, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	// A thread that shares its working directory with others cannot change
	// its mount namespace.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return err
	}
	return unix.Setns(fd, unix.CLONE_NEWNS)
}

// mountOverlay mounts o, whose paths are absolute, for the calling thread, the
// working directory of which it may change.
func mountOverlay(o *overlay, open contextOpener) *failure {
	short := o.shortened()
	if fd, err := open(); err == nil {
		defer unix.Close(fd)
		switch {
		case o.fitsContext():
			return mountContext(fd, o)
		case short.fitsContext():
			return inDir(short, func() *failure { return mountContext(fd, short) })
		}
	}
	// The kernel copies a page, and ends it with a zero byte.
	page := os.Getpagesize() - 1
	switch {
	case len(o.data()) <= page:
		return mountData(o)
	case len(short.data()) <= page:
		return inDir(short, func() *failure { return mountData(short) })
	}
	return &failure{err: unix.E2BIG}
}

// inDir calls mount with o.dir as the working directory of this thread alone.
func inDir(o *overlay, mount func() *failure) *failure {
	err := unix.Unshare(unix.CLONE_FS)
	if err == nil {
		err = unix.Chdir(o.dir)
	}
	if err != nil {
		return &failure{err: err, doing: "changing to the directory of the layers, " + show(o.dir)}
	}
	return mount()
}

// mountData mounts o with mount(2).
func mountData(o *overlay) *failure {
	if err := unix.Mount(o.source, o.target, "overlay", o.flags, o.data()); err != nil {
		return &failure{err: err}
	}
	return nil
}

// contextOpener gives a file system context for an overlay that takes
// lowerKey, or an error where mount(2) has to do.
type contextOpener func() (int, error)

// openContext is the contextOpener of the running kernel.
func openContext() (int, error) { return openContextOf("overlay") }

func openContextOf(fsType string) (int, error) {
	fd, err := unix.Fsopen(fsType, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, err
	}
	// Before Linux 6.5 overlayfs had a context that collects any string for
	// mount(2), lowerKey too, and finds out at the end. Ask with a flag: only
	// a kernel that knows the key minds that it has no value.
	err = unix.FsconfigSetFlag(fd, lowerKey)
	if err == unix.EINVAL && !strings.Contains(contextLog(fd), "Unknown parameter") {
		return fd, nil
	}
	unix.Close(fd)
	return -1, unix.EOPNOTSUPP
}

// fitsContext says whether fsconfig(2) takes all of o's strings.
func (o *overlay) fitsContext() bool {
	for _, p := range o.parameters() {
		if len(p.key) > maxParameter || len(p.value) > maxParameter {
			return false
		}
	}
	return true
}

// mountContext mounts o through the file system context fd. The target sees
// all of the mount or nothing.
func mountContext(fd int, o *overlay) *failure {
	for _, p := range append(o.parameters(), superFlags(o.flags)...) {
		var err error
		if p.hasValue {
			err = unix.FsconfigSetString(fd, p.key, p.value)
		} else {
			err = unix.FsconfigSetFlag(fd, p.key)
		}
		if err != nil {
			return &failure{err: err, option: p.key, log: contextLog(fd)}
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return &failure{err: err, log: contextLog(fd)}
	}
	mnt, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, mountAttributes(o.flags))
	if err != nil {
		return &failure{err: err, log: contextLog(fd)}
	}
	// What was not moved anywhere goes away with its descriptor.
	defer unix.Close(mnt)
	// As with mount(2), the target may be a symbolic link.
	const flags = unix.MOVE_MOUNT_F_EMPTY_PATH | unix.MOVE_MOUNT_T_SYMLINKS | unix.MOVE_MOUNT_T_AUTOMOUNTS
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, o.target, flags); err != nil {
		return &failure{err: err, doing: "attaching the mount"}
	}
	return nil
}

// superFlags gives the part of mount(2)'s flags that belongs to the file
// system, as parameters of its context.
func superFlags(flags uintptr) []option {
	var params []option
	for _, f := range []struct {
		flag uintptr
		key  string
	}{
		{unix.MS_RDONLY, "ro"},
		{unix.MS_SYNCHRONOUS, "sync"},
		{unix.MS_DIRSYNC, "dirsync"},
		{unix.MS_MANDLOCK, "mand"},
		{unix.MS_LAZYTIME, "lazytime"},
	} {
		if flags&f.flag != 0 {
			params = append(params, option{key: f.key})
		}
	}
	return params
}

// mountAttributes gives the part of mount(2)'s flags that belongs to the mount,
// as attributes for fsmount(2). Read-only is in both parts, as it is for
// mount(2).
func mountAttributes(flags uintptr) int {
	var attrs int
	for _, f := range []struct {
		flag uintptr
		attr int
	}{
		{unix.MS_RDONLY, unix.MOUNT_ATTR_RDONLY},
		{unix.MS_NOSUID, unix.MOUNT_ATTR_NOSUID},
		{unix.MS_NODEV, unix.MOUNT_ATTR_NODEV},
		{unix.MS_NOEXEC, unix.MOUNT_ATTR_NOEXEC},
		{unix.MS_NODIRATIME, unix.MOUNT_ATTR_NODIRATIME},
		{unix.MS_NOSYMFOLLOW, unix.MOUNT_ATTR_NOSYMFOLLOW},
		{unix.MS_NOATIME, unix.MOUNT_ATTR_NOATIME},
		{unix.MS_STRICTATIME, unix.MOUNT_ATTR_STRICTATIME},
	} {
		if flags&f.flag != 0 {
			attrs |= f.attr
		}
	}
	return attrs
}

// contextLog takes the errors out of the log of a file system context: one
// message for each read(2), "e overlay: Unknown parameter 'x'". Warnings and
// notices are left out.
func contextLog(fd int) string {
	var (
		messages []string
		buf      [1024]byte
	)
	for {
		n, err := unix.Read(fd, buf[:])
		if err == unix.EINTR {
			continue
		}
		if err != nil || n <= 0 {
			return strings.Join(messages, "; ")
		}
		if message, ok := bytes.CutPrefix(buf[:n], []byte("e ")); ok {
			messages = append(messages, strings.TrimSpace(string(message)))
		}
	}
}
