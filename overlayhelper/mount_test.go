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
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// noContext stands in for a kernel without lowerdir+.
func noContext() (int, error) { return -1, unix.ENOSYS }

// bothWays runs a test with a file system context and with mount(2).
func bothWays(t *testing.T, test func(t *testing.T, open contextOpener)) {
	t.Run("context", func(t *testing.T) {
		needMounts(t)
		fd, err := openContext()
		if err != nil {
			t.Skipf("this kernel's overlayfs has no %s: %v", lowerKey, err)
		}
		unix.Close(fd)
		test(t, openContext)
	})
	t.Run("mount(2)", func(t *testing.T) { test(t, noContext) })
}

// mountArgs mounts as the program does with these arguments.
func mountArgs(open contextOpener, args ...string) error {
	req, err := parseArgs(args)
	if err != nil {
		return err
	}
	return mountIn(req.namespace, &req.overlay, open)
}

// A kernel without lowerdir+ must be found out before anything is mounted.
// Other file systems stand in for its overlayfs: one that refuses keys that it
// does not know, and one that takes any key, as old contexts do.
func TestContextWithoutLowerKey(t *testing.T) {
	needMounts(t)
	for _, fsType := range []string{"tmpfs", "ramfs", "no-such-fs"} {
		t.Run(fsType, func(t *testing.T) {
			descriptors, err := os.ReadDir("/proc/self/fd")
			require.NoError(t, err)
			_, err = openContextOf(fsType)
			require.Error(t, err)
			after, err := os.ReadDir("/proc/self/fd")
			require.NoError(t, err)
			assert.Len(t, after, len(descriptors), "the context is closed")
		})
	}
}

// makeLayers makes n directories that overlayfs can stack: in each of them a
// file of its own, and one that all of them have.
func makeLayers(t *testing.T, root string, n int) []string {
	t.Helper()
	layers := make([]string, n)
	for i := range n {
		layers[i] = mkdir(t, root, strconv.Itoa(i)+"/fs")[0]
		write(t, filepath.Join(layers[i], "top"), strconv.Itoa(i))
		write(t, filepath.Join(layers[i], "layer-"+strconv.Itoa(i)), "")
	}
	return layers
}

func escapeAll(paths []string) string {
	escaped := make([]string, len(paths))
	for i, p := range paths {
		escaped[i] = escape(p)
	}
	return strings.Join(escaped, ":")
}

// A list of layers longer than a page was "invalid argument" for mount(2), or
// was cut at the page without a word.
func TestLongLists(t *testing.T) {
	for _, tc := range []struct {
		layers int
		// root is the number of characters of the layers' directory.
		root int
		// shortNames says that the layers' paths alone are too long for
		// fsconfig(2).
		shortNames bool
	}{
		{layers: 2, root: 63},
		{layers: 60, root: 63},
		{layers: 200, root: 120},
		{layers: 300, root: 700, shortNames: true},
		{layers: 2, root: 1800, shortNames: true},
	} {
		t.Run(fmt.Sprintf("%d layers, root path of %d", tc.layers, tc.root), func(t *testing.T) {
			bothWays(t, func(t *testing.T, open contextOpener) {
				dir := scratch(t)
				root := dir
				for len(root) < tc.root {
					root += "/" + strings.Repeat("r", min(200, tc.root-len(root)))
				}
				layers := makeLayers(t, root, tc.layers)
				target := mkdir(t, dir, "target")[0]
				up := mkdir(t, root, "up/fs", "up/work")
				before, err := os.Getwd()
				require.NoError(t, err)

				require.NoError(t, mountArgs(open, "overlay", target,
					"-o", "lowerdir="+strings.Join(layers, ":"),
					"-o", "upperdir="+up[0]+",workdir="+up[1]))

				assert.Equal(t, "0", read(t, filepath.Join(target, "top")), "the first layer is on top")
				names, err := filepath.Glob(filepath.Join(target, "layer-*"))
				require.NoError(t, err)
				assert.Len(t, names, tc.layers)
				write(t, filepath.Join(target, "new"), "")
				assert.FileExists(t, filepath.Join(up[0], "new"))
				after, err := os.Getwd()
				require.NoError(t, err)
				assert.Equal(t, before, after, "the process keeps its working directory")
			})
		})
	}
}

// The working directory belongs to all threads of a process. Mounts that
// change it at the same time must not see each other's.
func TestConcurrentRelativeMounts(t *testing.T) {
	dir := scratch(t)
	const mounts = 8
	var (
		layers  [mounts][]string
		targets [mounts]string
		errs    [mounts]error
		wg      sync.WaitGroup
	)
	for i := range mounts {
		root := filepath.Join(dir, strconv.Itoa(i), strings.Repeat("r", 100))
		layers[i] = makeLayers(t, root, 60)
		write(t, filepath.Join(layers[i][59], "mount"), strconv.Itoa(i))
		targets[i] = mkdir(t, dir, fmt.Sprintf("target%d", i))[0]
	}
	for i := range mounts {
		wg.Go(func() {
			errs[i] = mountArgs(noContext, "overlay", targets[i], "-o", "lowerdir="+strings.Join(layers[i], ":"))
		})
	}
	wg.Wait()
	for i := range mounts {
		require.NoError(t, errs[i])
		assert.Equal(t, strconv.Itoa(i), read(t, filepath.Join(targets[i], "mount")))
	}
}

// oddNames have what a shell, mount.fuse, an option list or overlayfs could
// take for something else.
var oddNames = []string{
	"colon:x", "two::x", "comma,x", `back\slash`, `back\:slash`, `end\`, "space x", " x ", "quote'x", `double"x`,
	"$HOME", "`id`", "$(id)", "a;b&c|d", "new\nline", "tab\tx", "star*", "hash#x", "tilde~", "eq=x", "üñ", "\xff", "-o", "%s",
}

func TestOddPaths(t *testing.T) {
	for _, odd := range oddNames {
		t.Run(strconv.Quote(odd), func(t *testing.T) {
			bothWays(t, func(t *testing.T, open contextOpener) {
				dir := scratch(t)
				d := mkdir(t, dir, odd+"/1", odd+"/2", odd+"/up", odd+"/work", odd+"/target")
				write(t, filepath.Join(d[0], "one"), "")
				write(t, filepath.Join(d[1], "two"), "")
				require.NoError(t, mountArgs(open, "overlay", d[4],
					"-o", "lowerdir="+escapeAll(d[:2])+",upperdir="+escape(d[2])+",workdir="+escape(d[3])))
				assertOverlay(t, d[4], d[2])
			})
		})
	}
}

// The same paths, relative to the directory of the layers.
func TestOddPathsShortened(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		dir := scratch(t)
		root := dir + strings.Repeat("/"+strings.Repeat("r", 200), 2)
		layers := makeLayers(t, root, 40)
		for i, odd := range oddNames {
			if i == 0 {
				// The kernel must not take a first colon for anything.
				odd = ":first"
			}
			layers = append(layers, mkdir(t, root, odd)[0])
			write(t, filepath.Join(root, odd, fmt.Sprintf("odd-%d", i)), "")
		}
		up := mkdir(t, root, "up:,\\/fs", "up:,\\/work")
		target := mkdir(t, dir, "target")[0]
		require.NoError(t, mountArgs(open, "overlay", target,
			"-o", "lowerdir="+escapeAll(layers)+",upperdir="+escape(up[0])+",workdir="+escape(up[1])))
		for i := range oddNames {
			assert.FileExists(t, filepath.Join(target, fmt.Sprintf("odd-%d", i)), oddNames[i])
		}
		write(t, filepath.Join(target, "new"), "")
		assert.FileExists(t, filepath.Join(up[0], "new"))
	})
}

// assertOverlay checks a mount of layers with the files "one" and "two".
func assertOverlay(t *testing.T, target, upper string) {
	t.Helper()
	assert.FileExists(t, filepath.Join(target, "one"))
	assert.FileExists(t, filepath.Join(target, "two"))
	write(t, filepath.Join(target, "new"), "")
	assert.FileExists(t, filepath.Join(upper, "new"))
}

// Both ways have to make the same mount. The flags of mount(2) are split
// between two system calls in the other one.
func TestFlags(t *testing.T) {
	for opts, want := range map[string]struct{ mount, fs string }{
		"dev,suid":                    {"rw,relatime", "rw"},
		"ro":                          {"ro,relatime", "ro"},
		"nodev,nosuid,noexec":         {"rw,nosuid,nodev,noexec,relatime", "rw"},
		"noatime":                     {"rw,noatime", "rw"},
		"nodiratime":                  {"rw,nodiratime,relatime", "rw"},
		"strictatime":                 {"rw", "rw"},
		"noatime,strictatime":         {"rw", "rw"},
		"strictatime,noatime":         {"rw,noatime", "rw"},
		"noatime,relatime":            {"rw,relatime", "rw"},
		"sync":                        {"rw,relatime", "rw,sync"},
		"dirsync":                     {"rw,relatime", "rw,dirsync"},
		"lazytime":                    {"rw,relatime", "rw,lazytime"},
		"nosymfollow":                 {"rw,relatime,nosymfollow", "rw"},
		"silent":                      {"rw,relatime", "rw"},
		"user=joe,_netdev,nofail,x-a": {"rw,nosuid,nodev,noexec,relatime", "rw"},
		"ro,nodev,sync,noatime":       {"ro,nodev,noatime", "ro,sync"},
	} {
		t.Run(opts, func(t *testing.T) {
			bothWays(t, func(t *testing.T, open contextOpener) {
				d := mkdir(t, scratch(t), "1", "2", "up", "work", "target")
				require.NoError(t, mountArgs(open, "source", d[4],
					"-o", "lowerdir="+d[0]+":"+d[1]+",upperdir="+d[2]+",workdir="+d[3]+","+opts))
				info := mountInfo(t, d[4])
				require.NotNil(t, info)
				assert.Equal(t, want.mount, info[0])
				assert.Equal(t, []string{"overlay", "source"}, info[1:3])
				fs, _, ok := strings.Cut(info[3], ",lowerdir")
				require.True(t, ok, info[3])
				assert.Equal(t, want.fs, fs)
			})
		})
	}
}

func TestOverlayOptionsReachTheKernel(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		d := mkdir(t, scratch(t), "1", "2", "up", "work", "target")
		require.NoError(t, mountArgs(open, "overlay", d[4],
			"-o", "lowerdir="+d[0]+":"+d[1]+",upperdir="+d[2]+",workdir="+d[3]+",volatile,index=on,redirect_dir=on"))
		info := mountInfo(t, d[4])
		require.NotNil(t, info)
		for _, opt := range []string{"volatile", "index=on", "redirect_dir=on"} {
			assert.Contains(t, info[3], opt)
		}
	})
}

// Data layers ("::") are another parameter for fsconfig(2).
func TestDataLayers(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		d := mkdir(t, scratch(t), "1", "data", "target")
		write(t, filepath.Join(d[0], "one"), "")
		write(t, filepath.Join(d[1], "hidden"), "")
		require.NoError(t, mountArgs(open, "overlay", d[2], "-o", "metacopy=on,lowerdir="+d[0]+"::"+d[1]))
		assert.FileExists(t, filepath.Join(d[2], "one"))
		assert.NoFileExists(t, filepath.Join(d[2], "hidden"))
	})
}

// mount(2) follows a target that is a symbolic link; move_mount(2) does not
// unless told to.
func TestTargetIsASymbolicLink(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		dir := scratch(t)
		d := mkdir(t, dir, "1", "2", "target")
		link := filepath.Join(dir, "link")
		require.NoError(t, os.Symlink("target", link))
		require.NoError(t, mountArgs(open, "overlay", link, "-o", "lowerdir="+d[0]+":"+d[1]))
		assert.NotNil(t, mountInfo(t, d[2]))
	})
}

// Relative paths belong to the caller's working directory.
func TestRelativePaths(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		dir := scratch(t)
		d := mkdir(t, dir, "1", "2", "up", "work", "target")
		write(t, filepath.Join(d[0], "one"), "")
		write(t, filepath.Join(d[1], "two"), "")
		t.Chdir(dir)
		require.NoError(t, mountArgs(open, "overlay", "target", "-o", "lowerdir=1:2,upperdir=./up,workdir=up/../work"))
		assertOverlay(t, d[4], d[2])
	})
}

// The message is all that a user sees, in containerd's log or in a pod's
// events: one line with target, error and reason, and nobody's secrets.
func TestFailures(t *testing.T) {
	for _, tc := range []struct {
		name string
		// opts are the options with %s for the directory of the test.
		opts   string
		target string
		// prepare gets the directory ready, if it needs more.
		prepare func(t *testing.T, dir string)
		errno   string
		want    string
		// contextOnly is what only the log of a context tells.
		contextOnly string
	}{
		{name: "no target", opts: "lowerdir=%s/1:%s/2", target: "nowhere", errno: "ENOENT", want: "the target does not exist; create the directory first"},
		{name: "target is a file", opts: "lowerdir=%s/1:%s/2", target: "file", errno: "ENOTDIR|EINVAL", want: "target %s/file is not a directory"},
		{name: "target below a file", opts: "lowerdir=%s/1:%s/2", target: "file/x", errno: "ENOTDIR", want: "target %s/file/x cannot be reached: not a directory (ENOTDIR)"},
		{name: "no layer", opts: "lowerdir=%s/1:%s/nowhere", errno: "ENOENT", want: "lowerdir %s/nowhere does not exist"},
		{name: "layer is a file", opts: "lowerdir=%s/1:%s/file", errno: "EINVAL|ENOTDIR", want: "lowerdir %s/file is not a directory"},
		{name: "no upperdir", opts: "lowerdir=%s/1,upperdir=%s/nowhere,workdir=%s/work", errno: "ENOENT", want: "upperdir %s/nowhere does not exist"},
		{name: "no workdir", opts: "lowerdir=%s/1,upperdir=%s/up,workdir=%s/nowhere", errno: "ENOENT", want: "workdir %s/nowhere does not exist"},
		{name: "odd path", opts: "lowerdir=%s/1:%s/new\nline", errno: "ENOENT", want: `/new\nline" does not exist`},
		{
			name: "different file systems", opts: "lowerdir=%s/1,upperdir=%s/up,workdir=%s/other/work", errno: "EINVAL",
			prepare: func(t *testing.T, dir string) {
				require.NoError(t, unix.Mount("tmpfs", mkdir(t, dir, "other")[0], "tmpfs", 0, ""))
				mkdir(t, dir, "other/work")
			},
			want: "upperdir %s/up and workdir %s/other/work are on different mounts; put them next to each other",
		},
		{
			name: "different mounts of one file system", opts: "lowerdir=%s/1,upperdir=%s/up,workdir=%s/other/work", errno: "EINVAL",
			prepare: func(t *testing.T, dir string) {
				mkdir(t, dir, "same/work")
				require.NoError(t, unix.Mount(dir+"/same", mkdir(t, dir, "other")[0], "", unix.MS_BIND, ""))
			},
			want: "are on different mounts; put them next to each other",
		},
		{
			name: "read-only", opts: "lowerdir=%s/1,upperdir=%s/other/up,workdir=%s/other/work", errno: "EINVAL",
			prepare: func(t *testing.T, dir string) {
				mkdir(t, dir, "other")
				require.NoError(t, unix.Mount("tmpfs", dir+"/other", "tmpfs", 0, ""))
				mkdir(t, dir, "other/up", "other/work")
				require.NoError(t, unix.Mount("", dir+"/other", "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			},
			want: "upperdir %s/other/up is on a read-only mount",
		},
		{
			name: "upperdir on overlayfs", opts: "lowerdir=%s/1,upperdir=%s/other/up,workdir=%s/other/work", errno: "EINVAL",
			prepare: func(t *testing.T, dir string) {
				mkdir(t, dir, "other", "oup", "owork")
				require.NoError(t, unix.Mount("overlay", dir+"/other", "overlay", 0, "lowerdir="+dir+"/2,upperdir="+dir+"/oup,workdir="+dir+"/owork"))
				mkdir(t, dir, "other/up", "other/work")
			},
			want: "upperdir %s/other/up is on overlayfs itself",
		},
		{name: "workdir in upperdir", opts: "lowerdir=%s/1,upperdir=%s/up,workdir=%s/up/in", errno: "EINVAL",
			prepare: func(t *testing.T, dir string) { mkdir(t, dir, "up/in") },
			want:    "upperdir %s/up and workdir %s/up/in are the same or one is inside the other"},
		{name: "workdir is upperdir", opts: "lowerdir=%s/1,upperdir=%s/up,workdir=%s/up", errno: "EINVAL", want: "are the same or one is inside the other"},
		{name: "a layer twice", opts: "lowerdir=%s/1:%s/1", errno: "ELOOP", want: "the layers overlap"},
		{name: "one layer alone", opts: "lowerdir=%s/1", errno: "EINVAL", want: "a single lowerdir only with an upperdir"},
		{
			name: "in use", opts: "index=on,lowerdir=%s/1,upperdir=%s/up,workdir=%s/work", errno: "EBUSY",
			prepare: func(t *testing.T, dir string) {
				require.NoError(t, unix.Mount("overlay", mkdir(t, dir, "other")[0], "overlay", 0, "index=on,lowerdir="+dir+"/1,upperdir="+dir+"/up,workdir="+dir+"/work"))
			},
			want: "in use by another overlay mount",
		},
		{
			name: "other layers than before", opts: "index=on,lowerdir=%s/1,upperdir=%s/up,workdir=%s/work", errno: "ESTALE",
			prepare: func(t *testing.T, dir string) {
				require.NoError(t, unix.Mount("overlay", mkdir(t, dir, "other")[0], "overlay", 0, "index=on,lowerdir="+dir+"/2,upperdir="+dir+"/up,workdir="+dir+"/work"))
				require.NoError(t, unix.Unmount(dir+"/other", 0))
			},
			want: "upperdir was used with other layers before",
		},
		{name: "unknown option", opts: "lowerdir=%s/1:%s/2,foo=" + secret, errno: "EINVAL", want: "", contextOnly: "overlayfs of this kernel has no option foo; remove it"},
		{name: "unknown flag", opts: "lowerdir=%s/1:%s/2,foo", errno: "EINVAL", want: "", contextOnly: "overlayfs of this kernel has no option foo; remove it"},
		{name: "unknown option that is no name", opts: "lowerdir=%s/1:%s/2," + secret, errno: "EINVAL", want: "", contextOnly: "has no option (not shown)"},
		{name: "wrong value", opts: "lowerdir=%s/1:%s/2,index=" + secret, errno: "EINVAL", want: "", contextOnly: "does not accept the value of option index"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bothWays(t, func(t *testing.T, open contextOpener) {
				dir := scratch(t)
				mkdir(t, dir, "1", "2", "up", "work", "target")
				write(t, filepath.Join(dir, "file"), "")
				if tc.prepare != nil {
					tc.prepare(t, dir)
				}
				fill := func(s string) string { return strings.ReplaceAll(s, "%s", dir) }
				target := filepath.Join(dir, "target")
				if tc.target != "" {
					target = filepath.Join(dir, tc.target)
				}
				// Mounts elsewhere come and go: removing a mount point in one
				// mount namespace unmounts it in all.
				count := func() int { return strings.Count(read(t, "/proc/self/mountinfo"), " "+dir) }
				before := count()

				err := mountArgs(open, "overlay", target, "-o", fill(tc.opts), "-o", volumeOption+"="+secret)

				require.Error(t, err)
				assert.True(t, strings.HasPrefix(err.Error(), target+": mounting overlay: "), err.Error())
				assert.Regexp(t, `\((`+tc.errno+`)\): `, err.Error())
				assert.Contains(t, err.Error(), fill(tc.want))
				if strings.HasSuffix(t.Name(), "/context") {
					assert.Contains(t, err.Error(), tc.contextOnly)
				}
				assert.NotContains(t, err.Error(), secret)
				assert.NotContains(t, err.Error(), "\n")
				assert.Equal(t, before, count(), "a failed mount leaves no mount")
			})
		})
	}
}

func TestTooManyLayers(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		dir := scratch(t)
		layers := makeLayers(t, dir, maxLayers+1)
		target := mkdir(t, dir, "target")[0]
		err := mountArgs(open, "overlay", target, "-o", "lowerdir="+strings.Join(layers, ":"))
		require.ErrorContains(t, err, "501 lower layers are more than the 500 that overlayfs takes")
		require.NoError(t, mountArgs(open, "overlay", target, "-o", "lowerdir="+strings.Join(layers[1:], ":")))
	})
}

// mount(2) cuts its data after a page; that would be a mount with layers
// missing.
func TestTooLongForAPage(t *testing.T) {
	dir := scratch(t)
	var layers []string
	for i := range 20 {
		layers = append(layers, mkdir(t, dir, strconv.Itoa(i)+strings.Repeat("x", 250))[0])
	}
	target := mkdir(t, dir, "target")[0]
	err := mountArgs(noContext, "overlay", target, "-o", "lowerdir="+strings.Join(layers, ":"))
	require.ErrorContains(t, err, "use fewer layers or shorter paths")
	assert.Nil(t, mountInfo(t, target))
}

// containerd itself is the caller that matters: it runs mount.fuse, which adds
// options and runs the helper through a shell.
func TestThroughContainerd(t *testing.T) {
	needMounts(t)
	if _, err := exec.LookPath("mount.fuse"); err != nil {
		t.Skip("needs mount.fuse (Debian: fuse3): ", err)
	}
	helper := binary(t)
	t.Setenv("PATH", filepath.Dir(helper)+":"+os.Getenv("PATH"))

	for _, typ := range []string{"fuse.nydus-overlayfs-guest-pull", "fuse." + helper} {
		t.Run("type "+filepath.Base(typ), func(t *testing.T) {
			d := mkdir(t, scratch(t), "1", "2", "up", "work", "target")
			write(t, filepath.Join(d[0], "one"), "")
			write(t, filepath.Join(d[1], "two"), "")
			m := mount.Mount{Type: typ, Source: "overlay", Options: []string{
				"workdir=" + d[3], "upperdir=" + d[2], "lowerdir=" + d[0] + ":" + d[1], volumeOption + "=" + secret, "noatime",
			}}
			require.NoError(t, m.Mount(d[4]))
			assertOverlay(t, d[4], d[2])
			info := mountInfo(t, d[4])
			assert.Equal(t, "rw,noatime", info[0])
			assert.NotContains(t, info[3], secret)
			require.NoError(t, mount.UnmountAll(d[4], 0))
			assert.Nil(t, mountInfo(t, d[4]))

			m.Options = append(m.Options, "ro", "nodev", "nosuid")
			require.NoError(t, m.Mount(d[4]))
			assert.Equal(t, "ro,nosuid,nodev,noatime", mountInfo(t, d[4])[0])
		})
	}

	for _, odd := range oddNames {
		t.Run(strconv.Quote(odd), func(t *testing.T) {
			d := mkdir(t, scratch(t), odd+"/1", odd+"/2", odd+"/up", odd+"/work", odd+"/target")
			write(t, filepath.Join(d[0], "one"), "")
			write(t, filepath.Join(d[1], "two"), "")
			m := mount.Mount{Type: "fuse." + helper, Source: "overlay", Options: []string{
				"workdir=" + escape(d[3]), "upperdir=" + escape(d[2]), "lowerdir=" + escapeAll(d[:2]),
			}}
			require.NoError(t, m.Mount(d[4]))
			assertOverlay(t, d[4], d[2])
		})
	}

	t.Run("200 layers", func(t *testing.T) {
		dir := scratch(t)
		layers := makeLayers(t, filepath.Join(dir, strings.Repeat("r", 100)), 200)
		target := mkdir(t, dir, "target")[0]
		m := mount.Mount{Type: "fuse." + helper, Source: "overlay", Options: []string{"lowerdir=" + strings.Join(layers, ":")}}
		require.NoError(t, m.Mount(target))
		assert.FileExists(t, filepath.Join(target, "layer-199"))
	})

	t.Run("failure", func(t *testing.T) {
		d := mkdir(t, scratch(t), "1", "target")
		m := mount.Mount{Type: "fuse." + helper, Source: "overlay", Options: []string{"lowerdir=" + d[0] + ":" + d[0] + "x"}}
		err := m.Mount(d[1])
		require.ErrorContains(t, err, "no such file or directory (ENOENT): lowerdir "+d[0]+"x does not exist")
	})
}

func TestExitCodes(t *testing.T) {
	helper := binary(t)
	for _, tc := range []struct {
		name   string
		args   []string
		code   int
		stdout string
		stderr string
	}{
		{name: "version", args: []string{"--version"}, stdout: "guest-pull-overlayfs 1.2.3-test\n"},
		{name: "help", args: []string{"--help"}, stdout: help},
		{name: "fake", args: []string{"overlay", "/nowhere", "-fo", "lowerdir=/a:/b"}},
		{name: "fake and verbose", args: []string{"overlay", "/nowhere", "-fv", "-o", "lowerdir=/a:/b"}, stdout: "guest-pull-overlayfs: overlay mounted on /nowhere\n"},
		{name: "usage", args: []string{"overlay"}, code: 1, stderr: "a source and a target are needed"},
		{name: "usage in options", args: []string{"overlay", "/nowhere", "-f"}, code: 1, stderr: "/nowhere: option lowerdir is missing"},
		{name: "namespace", args: []string{"overlay", "/mnt", "-N/nowhere", "-olowerdir=/a"}, code: 32, stderr: "/mnt: entering mount namespace /nowhere: no such file or directory (ENOENT)"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := runCommand(t, exec.Command(helper, tc.args...))
			assert.Equal(t, tc.code, got.code)
			assert.Equal(t, tc.stdout, got.stdout)
			if tc.stderr == "" {
				assert.Empty(t, got.stderr)
				return
			}
			assert.True(t, strings.HasPrefix(got.stderr, "guest-pull-overlayfs: "+tc.stderr), got.stderr)
			assert.Equal(t, 1, strings.Count(got.stderr, "\n"))
		})
	}

	t.Run("mounted", func(t *testing.T) {
		d := mkdir(t, scratch(t), "1", "2", "target")
		got := runCommand(t, exec.Command(helper, "overlay", d[2], "-vo", "lowerdir="+d[0]+":"+d[1]))
		assert.Equal(t, result{0, "guest-pull-overlayfs: overlay mounted on " + d[2] + "\n", ""}, got)
		assert.NotNil(t, mountInfo(t, d[2]))
	})
	t.Run("failed", func(t *testing.T) {
		d := mkdir(t, scratch(t), "1", "target")
		got := runCommand(t, exec.Command(helper, "overlay", d[1], "-o", "lowerdir="+d[0]+":/nowhere,"+volumeOption+"="+secret))
		assert.Equal(t, result{32, "", "guest-pull-overlayfs: " + d[1] +
			": mounting overlay: no such file or directory (ENOENT): lowerdir /nowhere does not exist\n"}, got)
	})
}

func TestNotRoot(t *testing.T) {
	cmd := exec.Command(binary(t), "overlay", "/mnt", "-o", "lowerdir=/usr:/etc,"+volumeOption+"="+secret)
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	}
	got := runCommand(t, cmd)
	assert.Equal(t, result{32, "", "guest-pull-overlayfs: /mnt: mounting overlay: operation not permitted (EPERM): only root can mount; run it as root\n"}, got)
}

// mount -N makes the mount where another process sees it, and only there.
func TestNamespace(t *testing.T) {
	bothWays(t, func(t *testing.T, open contextOpener) {
		dir := scratch(t)
		d := mkdir(t, dir, "1", "2", "target")
		write(t, filepath.Join(d[0], "one"), "")

		// Pdeathsig is about the thread that starts the process, and threads
		// end here.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		other := exec.Command("sleep", "600")
		other.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
		require.NoError(t, other.Start())
		defer func() {
			other.Process.Kill()
			other.Wait()
		}()
		pid := strconv.Itoa(other.Process.Pid)

		require.NoError(t, mountArgs(open, "overlay", d[2], "-N", pid, "-o", "lowerdir="+d[0]+":"+d[1]))
		assert.NoFileExists(t, filepath.Join(d[2], "one"))
		assert.FileExists(t, filepath.Join("/proc", pid, "root", d[2], "one"))

		err := mountArgs(open, "overlay", filepath.Join(dir, "nowhere"), "-N", "/proc/"+pid+"/ns/mnt", "-o", "lowerdir="+d[0]+":"+d[1])
		require.ErrorContains(t, err, "the target does not exist")
	})
}

// A helper that is run for every look-up in a root file system has to be small
// and quick to start: no dependency but x/sys, nothing that drags in a network
// stack, no formatter built on reflection.
func TestSizeAndDependencies(t *testing.T) {
	const limit = 2_500_000
	st, err := os.Stat(binary(t))
	require.NoError(t, err)
	t.Logf("%d bytes", st.Size())
	assert.LessOrEqual(t, st.Size(), int64(limit))

	cmd := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{else if or (eq .ImportPath \"net\") (eq .ImportPath \"fmt\")}}{{.ImportPath}}{{end}}", ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	got := runCommand(t, cmd)
	require.Zero(t, got.code, got.stderr)
	assert.ElementsMatch(t, []string{"github.com/guest-pull/guest-pull-snapshotter/overlayhelper", "golang.org/x/sys/unix"}, strings.Fields(got.stdout))
}
