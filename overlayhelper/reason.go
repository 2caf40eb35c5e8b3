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
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// maxLayers is the most lower layers that overlayfs takes (OVL_MAX_STACK in
// fs/overlayfs/params.h).
const maxLayers = 500

// errnoText is the kernel's error, without what the caller says anyway.
func errnoText(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		if symbol := unix.ErrnoName(errno); symbol != "" {
			return errno.Error() + " (" + symbol + ")"
		}
	}
	return err.Error()
}

// reason says why o was not mounted and what to do about it, or "" if it cannot
// tell. mount(2) gives a number and no more, and much of what overlayfs has to
// say goes to the kernel's log only; so this looks at what is there.
func reason(o *overlay, f *failure) string {
	var errno unix.Errno
	errors.As(f.err, &errno)
	if errno == unix.EPERM {
		if os.Geteuid() != 0 {
			return "only root can mount; run it as root"
		}
		return "mounting needs CAP_SYS_ADMIN in this mount namespace, and a seccomp or security profile that allows it"
	}
	if errno == unix.E2BIG {
		return "the options are longer than a memory page (" + strconv.Itoa(os.Getpagesize()) +
			" bytes), even relative to the directory of the layers, and not fit for fsconfig; use fewer layers or shorter paths"
	}
	if f.option != "" && !isPathOption(f.option) {
		if strings.Contains(f.log, "Unknown parameter") {
			return "overlayfs of this kernel has no option " + showKey(f.option) + "; remove it"
		}
		return "overlayfs of this kernel does not accept the value of option " + showKey(f.option)
	}
	if why := reasonInPaths(o); why != "" {
		return why
	}
	switch errno {
	case unix.ENODEV:
		return "this kernel has no overlayfs; load it with \"modprobe overlay\""
	case unix.ESTALE:
		return "upperdir was used with other layers before; use a new upperdir and workdir"
	case unix.ELOOP:
		return "the layers overlap: one of them is given twice or is inside another one"
	case unix.EBUSY:
		return "upperdir or workdir is in use by another overlay mount; unmount that first"
	case unix.ENOSPC:
		return "the file system of workdir is full, or the mount namespace has as many mounts as /proc/sys/fs/mount-max allows"
	case unix.EINVAL:
		if why := reasonInUpper(o); why != "" {
			return why
		}
		if o.upper == "" && len(o.lower) == 1 {
			return "overlayfs takes a single lowerdir only with an upperdir; add upperdir and workdir, or another lowerdir"
		}
		if len(o.lower) > maxLayers {
			return strconv.Itoa(len(o.lower)) + " lower layers are more than the " + strconv.Itoa(maxLayers) + " that overlayfs takes"
		}
	}
	if log := publicLog(o, f.log); log != "" {
		return log
	}
	if errno == unix.EINVAL {
		return "an option is unknown or does not fit the others; the kernel's log (dmesg) has the reason"
	}
	return ""
}

func isPathOption(key string) bool {
	switch key {
	case "source", "upperdir", "workdir", lowerKey, dataKey:
		return true
	}
	return false
}

// reasonInPaths looks for what is not there, or is no directory.
func reasonInPaths(o *overlay) string {
	if why := notDirectory("target", o.target); why != "" {
		return why
	}
	for _, l := range o.lower {
		if why := notDirectory("lowerdir", l.path); why != "" {
			return why
		}
	}
	if o.upper == "" {
		return ""
	}
	if why := notDirectory("upperdir", o.upper); why != "" {
		return why
	}
	return notDirectory("workdir", o.work)
}

func notDirectory(role, path string) string {
	var st unix.Stat_t
	switch err := unix.Stat(path, &st); {
	case err == unix.ENOENT && role == "target":
		return "the target does not exist; create the directory first"
	case err == unix.ENOENT:
		return role + " " + show(path) + " does not exist"
	case err != nil:
		return role + " " + show(path) + " cannot be reached: " + errnoText(err)
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return role + " " + show(path) + " is not a directory"
	}
	return ""
}

// reasonInUpper looks for what overlayfs demands of upperdir and workdir, which
// exist.
func reasonInUpper(o *overlay) string {
	if o.upper == "" {
		return ""
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(o.upper, &fs); err == nil {
		switch {
		case fs.Type == unix.OVERLAYFS_SUPER_MAGIC:
			return "upperdir " + show(o.upper) + " is on overlayfs itself, which cannot be written through; use one on another file system, such as ext4, xfs or tmpfs"
		case fs.Flags&unix.ST_RDONLY != 0:
			return "upperdir " + show(o.upper) + " is on a read-only mount"
		}
	}
	upper, okUpper := mountOf(o.upper)
	work, okWork := mountOf(o.work)
	if okUpper && okWork && upper != work {
		return "upperdir " + show(o.upper) + " and workdir " + show(o.work) + " are on different mounts; put them next to each other"
	}
	if inside(o.upper, o.work) || inside(o.work, o.upper) {
		return "upperdir " + show(o.upper) + " and workdir " + show(o.work) + " are the same or one is inside the other; put them next to each other"
	}
	return ""
}

// mountOf identifies the mount that a path is on.
func mountOf(path string) ([3]uint64, bool) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, 0, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
		return [3]uint64{}, false
	}
	// Without STATX_MNT_ID the ID is zero, and the device has to do.
	return [3]uint64{uint64(st.Dev_major), uint64(st.Dev_minor), st.Mnt_id}, true
}

// inside says whether path is dir or below it, by their names.
func inside(path, dir string) bool {
	path, dir = strings.TrimRight(path, "/")+"/", strings.TrimRight(dir, "/")+"/"
	return strings.HasPrefix(path, dir)
}

// publicLog is the log on one line, or nothing at all if it could have an
// option's value in it.
func publicLog(o *overlay, log string) string {
	for _, opt := range o.other {
		// No value that overlayfs knows is longer than "nofollow".
		const longest = 8
		value := strings.Trim(opt.value, `"`)
		if len(value) > longest && strings.Contains(log, value) || showKey(opt.key) != opt.key && strings.Contains(log, opt.key) {
			return ""
		}
	}
	return strings.Map(func(r rune) rune {
		if !strconv.IsPrint(r) {
			return '?'
		}
		return r
	}, log)
}
