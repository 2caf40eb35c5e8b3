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

// Command guest-pull-overlayfs is the mount helper for the root filesystems
// that the guest-pull snapshotter hands out. A Kata runtime passes such a mount
// to the guest instead of mounting it. Whoever mounts it on the host, as
// containerd does to look up a user or to copy an image's volumes, reaches this
// program through mount.fuse, and gets a plain overlay mount: the option that is
// meant for the guest is dropped.
//
// It is called as mount(8), "EXTERNAL HELPERS", says, and exits as mount(8)
// does: 0 when mounted, 1 for a wrong invocation, 32 for a failed mount. A
// failure is one line on standard error. The line never has an option's value
// in it, other than the paths of the layers.
package main

import (
	"os"
)

// name is what messages start with, whatever name the program was called by.
const name = "guest-pull-overlayfs"

// version is set by the linker: -ldflags '-X main.version=1.2.3'.
var version = "unknown"

// Exit codes of mount(8).
const (
	exitOK    = 0
	exitUsage = 1
	exitMount = 32
)

const help = `Usage: guest-pull-overlayfs SOURCE TARGET [-fnsv] [-N NAMESPACE] [-t TYPE] [-o OPTION[,OPTION]...]...

Mounts an overlay file system on TARGET, without the option
io.katacontainers.volume, which is meant for a guest. It is a mount helper: it
is run by mount.fuse for the mount types fuse.guest-pull-overlayfs and
fuse.nydus-overlayfs-guest-pull.

  -o OPTIONS    generic mount options, as in mount(8), and those of overlayfs;
                write "\:", "\," and "\\" for ":", "," and "\" in a path
  -N NAMESPACE  mount in this mount namespace: a process ID, or a path such as
                /proc/PID/ns/mnt
  -t TYPE       accepted and ignored, the type is always overlay
  -f            check the options, mount nothing
  -v            say what was mounted
  -n, -s        accepted and ignored
  -h, --help    show this text
  -V, --version show the version

Exit status: 0 mounted, 1 wrong invocation, 32 the mount failed.
`

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	req, err := parseArgs(args)
	if err != nil {
		return fail(exitUsage, err.Error()+"; see "+name+" --help")
	}
	switch {
	case req.help:
		os.Stdout.WriteString(help)
		return exitOK
	case req.version:
		os.Stdout.WriteString(name + " " + version + "\n")
		return exitOK
	}
	if !req.fake {
		if err := mountIn(req.namespace, &req.overlay, openContext); err != nil {
			return fail(exitMount, err.Error())
		}
	}
	if req.verbose {
		os.Stdout.WriteString(name + ": overlay mounted on " + show(req.overlay.target) + "\n")
	}
	return exitOK
}

// fail writes the one line that mount(8) and containerd show to their users.
func fail(code int, message string) int {
	os.Stderr.WriteString(name + ": " + message + "\n")
	return code
}
