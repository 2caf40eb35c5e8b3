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

package users

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/continuity/testutil"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"
)

// TestAgainstOverlay unpacks random images as containerd does for the overlay
// snapshotter, mounts them, and looks the files up as a process in a container
// would. Whatever comes of it is what Read has to find.
func TestAgainstOverlay(t *testing.T) {
	testutil.RequiresRoot(t)
	const images = 400
	compared := map[string]int{}
	for seed := range uint64(images) {
		random := rand.New(rand.NewPCG(seed, 0))
		var r registry
		var layers [][]entry
		for range 1 + random.IntN(4) {
			layers = append(layers, randomLayer(random))
			r.add(t, "", makeTar(t, layers[len(layers)-1]...))
		}
		files, _, err := Read(t.Context(), r.layers, r.fetch)

		expected, unpackErr := unpack(t, layers)
		if errors.Is(unpackErr, errNoFile) {
			require.Errorf(t, err, "seed %d: %v: there is something that is no regular file", seed, layers)
			compared["unusable"]++
			continue
		}
		if unpackErr != nil {
			// No container runs of it. There is nothing to be equal to.
			compared["cannot be unpacked"]++
			continue
		}
		require.NoErrorf(t, err, "seed %d: %v", seed, layers)
		require.Truef(t, files.Equal(expected), "seed %d: %v\nRead: %q %q\noverlayfs: %q %q",
			seed, layers, text(files.Passwd), text(files.Group), text(expected.Passwd), text(expected.Group))
		if files.Passwd == nil && files.Group == nil {
			compared["neither file"]++
		} else {
			compared["a file"]++
		}
	}
	t.Log(compared)
	for _, outcome := range []string{"a file", "neither file", "unusable"} {
		require.Greaterf(t, compared[outcome], images/50, "too few random images come to this: %v", compared)
	}
}

var errNoFile = errors.New("not a regular file")

// randomLayer makes a layer of few names, so that they meet often.
func randomLayer(random *rand.Rand) []entry {
	names := []string{"etc", "etc/passwd", "etc/group", "a", "a/passwd", "a/b", "a/b/group", "b", "b/passwd"}
	targets := []string{"/etc", "a", "../a", "/a/b", "b", "passwd", "../a/passwd", "/b/passwd", ".", "group", "../../b", "a/b/../passwd"}
	var entries []entry
	for i := range 1 + random.IntN(7) {
		name := names[random.IntN(len(names))]
		switch random.IntN(10) {
		case 0:
			entries = append(entries, symlinkTo(name, targets[random.IntN(len(targets))]))
		case 1:
			if random.IntN(2) == 0 || len(entries) == 0 {
				entries = append(entries, dir(name))
				break
			}
			entries = append(entries, hardlinkTo(name, entries[random.IntN(len(entries))].name))
		case 2:
			entries = append(entries, file(filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name)), ""))
		case 3:
			// Not at the root: the kernel takes no notice of it there, where the
			// specification and containerd's look-up (internal/fsview) do.
			if dir := filepath.Dir(name); dir != "." {
				entries = append(entries, file(filepath.Join(dir, ".wh..wh..opq"), ""))
			}
		default:
			if !strings.Contains(name, "/") {
				entries = append(entries, dir(name))
				break
			}
			entries = append(entries, file(name, fmt.Sprintf("%s %d %d", name, i, random.IntN(1000))))
		}
	}
	return entries
}

// unpack returns what is at the two paths, errNoFile if it is no regular file,
// or containerd's error.
func unpack(t *testing.T, layers [][]entry) (found Files, _ error) {
	root := t.TempDir()
	var lower []string // topmost first
	for i, l := range layers {
		upper := filepath.Join(root, fmt.Sprint(i))
		require.NoError(t, os.Mkdir(upper, 0o755))
		if _, err := archive.Apply(t.Context(), upper, bytes.NewReader(makeTar(t, l...)),
			archive.WithConvertWhiteout(archive.OverlayConvertWhiteout), archive.WithParents(lower)); err != nil {
			return Files{}, err
		}
		lower = append([]string{upper}, lower...)
	}
	empty, merged := filepath.Join(root, "empty"), filepath.Join(root, "merged")
	require.NoError(t, errors.Join(os.Mkdir(empty, 0o755), os.Mkdir(merged, 0o755)))
	m := mount.Mount{Type: "overlay", Source: "overlay", Options: []string{"lowerdir=" + strings.Join(append(lower, empty), ":")}}
	require.NoError(t, m.Mount(merged))
	defer func() { require.NoError(t, mount.UnmountAll(merged, 0)) }()

	for name, content := range map[string]*[]byte{passwd: &found.Passwd, group: &found.Group} {
		data, err := readInRoot(merged, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return Files{}, errNoFile
		default:
			*content = data
		}
	}
	return found, nil
}

// readInRoot reads a regular file as a process does whose root is there.
func readInRoot(root, name string) ([]byte, error) {
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_NONBLOCK | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	dir, err := os.Open(root)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	fd, err := unix.Openat2(int(dir.Fd()), name, &how)
	for errors.Is(err, unix.EAGAIN) { // at a ".." while anybody renames or mounts
		fd, err = unix.Openat2(int(dir.Fd()), name, &how)
	}
	if errors.Is(err, unix.ENOTDIR) {
		return nil, fs.ErrNotExist
	} else if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, errNoFile
	}
	return io.ReadAll(f)
}
