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

package integration_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/images"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

const resolveUsers = "resolve_users = 'registry'"

const (
	somePasswd = "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1::/:\nnginx:x:101:102:nginx:/:/sbin/nologin\nnogroup:x:105:4242::/:\n"
	someGroup  = "root:x:0:root\nbin:x:1:root,daemon\ndaemon:x:2:root,daemon\nadm:x:4:root,nginx\nnginx:x:102:nginx\nwww:x:103:nginx,app\n"
)

// text makes regular files of a layer.
func text(nameAndData ...string) (files []images.File) {
	for i := 0; i < len(nameAndData); i += 2 {
		files = append(files, images.File{Name: nameAndData[i], Mode: 0o644, Data: nameAndData[i+1]})
	}
	return files
}

func etcDir() images.File { return images.File{Name: "etc", Mode: fs.ModeDir | 0o755} }

// userImages are images that differ in where their users come from, and in how
// they name the one that they run as.
func userImages() []images.Spec {
	var big strings.Builder
	big.WriteString(somePasswd)
	for i := 10_000; big.Len() < 2<<20; i++ {
		fmt.Fprintf(&big, "user%d:x:%d:%d:made up:/home/%d:/bin/sh\n", i, i, i, i)
	}
	big.WriteString("last:x:4711:4712::/:\n")

	specs := []images.Spec{
		{Name: "none-root", NoUsers: true},
		{Name: "none-uid", NoUsers: true, User: "101"},
		{Name: "none-name", NoUsers: true, User: "nginx"},
		{Name: "none-uid-group", NoUsers: true, User: "101:www"},
		{Name: "none-uid-gid", NoUsers: true, User: "101:7"},
		{Name: "two-megabytes", Passwd: big.String(), Group: someGroup, User: "last"},
		{Name: "unknown-name", User: "nginx"},

		{Name: "later-layer", User: "nginx", Top: [][]images.File{text("etc/passwd", somePasswd, "etc/group", someGroup)}},
		{Name: "later-layers", User: "nginx:www", Top: [][]images.File{text("etc/passwd", somePasswd), text("etc/group", someGroup), text("a", "b")}},
		{Name: "whiteout-name", User: "nginx", Passwd: somePasswd, Top: [][]images.File{text("etc/.wh.passwd", "")}},
		{Name: "whiteout-uid", User: "101", Passwd: somePasswd, Top: [][]images.File{text("etc/.wh.passwd", "")}},
		{Name: "whiteout-group", User: "nginx", Passwd: somePasswd, Group: someGroup, Top: [][]images.File{text("etc/.wh.group", "")}},
		{Name: "whiteout-and-again", User: "nginx", Passwd: strings.ReplaceAll(somePasswd, "101", "7"),
			Top: [][]images.File{text("etc/.wh.passwd", ""), text("etc/passwd", somePasswd)}},
		{Name: "opaque", User: "nginx", Passwd: somePasswd, Group: someGroup,
			Top: [][]images.File{append([]images.File{etcDir()}, text("etc/.wh..wh..opq", "", "etc/group", someGroup)...)}},
		{Name: "replaced-directory", User: "nginx", Passwd: somePasswd, Top: [][]images.File{text(".wh.etc", "")}},

		{Name: "link-relative", User: "nginx", NoUsers: true, Top: [][]images.File{append(
			text("usr/lib/passwd", somePasswd, "usr/lib/group", someGroup),
			images.File{Name: "etc/passwd", Link: "../usr/lib/passwd"}, images.File{Name: "etc/group", Link: "../usr/lib/group"})}},
		{Name: "link-absolute", User: "nginx:www", NoUsers: true, Top: [][]images.File{
			text("usr/lib/passwd", somePasswd, "usr/lib/group", someGroup),
			{{Name: "etc/passwd", Link: "/usr/lib/passwd"}, {Name: "etc/group", Link: "/usr/lib/group"}}}},
		{Name: "link-dangling", User: "101", Passwd: somePasswd, Top: [][]images.File{{{Name: "etc/passwd", Link: "/nowhere"}}}},
		{Name: "hard-link", User: "nginx", NoUsers: true, Top: [][]images.File{append(
			text("a", somePasswd, "b", someGroup),
			images.File{Name: "etc/passwd", Link: "a", Hard: true}, images.File{Name: "etc/group", Link: "b", Hard: true})}},

		{Name: "zstd", User: "nginx:adm", Passwd: somePasswd, Group: someGroup, Layers: 3, Encoding: images.Zstd},
		{Name: "uncompressed", User: "nginx:adm", Passwd: somePasswd, Group: someGroup, Layers: 3, Encoding: images.Uncompressed},
	}
	for name, user := range map[string]string{
		"root": "", "root-name": "root", "root-uid": "0", "name": "nginx", "name-group": "nginx:www", "uid-name": "101:www",
		"name-gid": "nginx:7", "uid": "101", "uid-gid": "101:103", "unknown-uid": "4711", "daemon": "daemon",
		"unknown-group": "nginx:nosuch", "group-of-nobody": "nogroup", "unknown-user-known-group": "nosuch:www", "root-group": "root:adm",
	} {
		specs = append(specs, images.Spec{Name: "user-" + name, User: user, Passwd: somePasswd, Group: someGroup, Layers: 2})
	}
	return specs
}

// processUser returns process.user of a container's OCI spec, as it is stored.
func processUser(ctx context.Context, n *harness.Node, id string) (string, error) {
	c, err := n.Client.ContainerService().Get(harness.CRI(ctx), id)
	if err != nil {
		return "", err
	}
	var spec struct {
		Process struct {
			User json.RawMessage `json:"user"`
		} `json:"process"`
	}
	if err := json.Unmarshal(c.Spec.GetValue(), &spec); err != nil {
		return "", err
	}
	return string(spec.Process.User), nil
}

// createdUser creates a container and returns its user.
func createdUser(t *testing.T, n *harness.Node, pod *harness.Pod, s harness.ContainerSpec) (string, error) {
	t.Helper()
	c, err := pod.Create(t.Context(), s)
	if err != nil {
		return "", err
	}
	user, err := processUser(t.Context(), n, c.ID)
	require.NoError(t, err)
	require.NotEmpty(t, user)
	require.NoError(t, c.Remove(t.Context()))
	return user, nil
}

// createdUserOfImage is createdUser for a request that says nothing of the user, as
// crictl's. kubelet drops the group of an image's user.
func createdUserOfImage(t *testing.T, n *harness.Node, pod *harness.Pod, ref string) (string, error) {
	t.Helper()
	c, err := pod.Create(t.Context(), harness.ContainerSpec{Image: ref, RunAsUser: new(int64(1)), RunAsGroup: new(int64(1))})
	require.NoError(t, err)
	require.NoError(t, c.Remove(t.Context()))
	security := c.Config.GetLinux().GetSecurityContext()
	security.RunAsUser, security.RunAsGroup, security.RunAsUsername = nil, nil, ""
	if c, err = pod.CreateFrom(t.Context(), c.Config); err != nil {
		return "", err
	}
	user, err := processUser(t.Context(), n, c.ID)
	require.NoError(t, err)
	require.NoError(t, c.Remove(t.Context()))
	return user, nil
}

// requireUserPatches skips a test of what only a containerd can do that lets the
// snapshotter look into layers.
func requireUserPatches(t *testing.T, n *harness.Node) {
	t.Helper()
	if !hasPatch(n, "0008") {
		t.Skip("this containerd does not let a snapshotter look into layers: it was built without patch 0008")
	}
}

// newUsersNode is a node on which users are read from the registry, with the exact
// calls of today's kubelet.
func newUsersNode(t *testing.T, o harness.Options) (*harness.Node, *registry.Registry) {
	t.Helper()
	if o.Registry == nil {
		o.Registry = newRegistry(t)
	}
	o.PluginConfig, o.PullHint = resolveUsers+"\n"+o.PluginConfig, harness.HintNone
	n := harness.New(t, o)
	requireUserPatches(t, n)
	return n, o.Registry
}

// With resolve_users a container in a guest is the user that it is under runc
// with overlayfs on the same containerd, byte for byte in the spec, and one that
// cannot be created there cannot be created here, and is told what to do: no name
// ever comes out as another ID. The exception is the group that the image gives to a
// number that it has no user for, which Kubernetes makes 0 under runc.
func TestUsersAreThoseOfRunc(t *testing.T) {
	for i, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			specs := userImages()
			if i > 0 {
				// What is made of layers does not depend on who pulled.
				specs = slices.DeleteFunc(specs, func(s images.Spec) bool {
					return !slices.Contains([]string{"none-name", "later-layers", "whiteout-name", "link-relative", "zstd", "user-name-group", "user-root"}, s.Name)
				})
			}
			n, reg := newUsersNode(t, path.options)
			inGuest := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			underRunc := runPod(t, n, harness.PodSpec{Handler: harness.Runc})
			same, failed := 0, 0
			for _, spec := range specs {
				t.Run(spec.Name, func(t *testing.T) {
					img := push(t, reg, spec)
					cases := map[string]harness.ContainerSpec{
						"image's user":           {Image: img.Ref},
						"no user in the request": {Image: img.Ref},
						"runAsUser":              {Image: img.Ref, RunAsUser: new(int64(101))},
						"runAsGroup":             {Image: img.Ref, RunAsUser: new(int64(101)), RunAsGroup: new(int64(9))},
						"root":                   {Image: img.Ref, RunAsUser: new(int64(0))},
					}
					create := func(pod *harness.Pod, name string, c harness.ContainerSpec) (string, error) {
						if name == "no user in the request" {
							return createdUserOfImage(t, n, pod, c.Image)
						}
						return createdUser(t, n, pod, c)
					}
					before := n.Blobs(img.Layers...) // of images that share layers with this one
					got, guestErr := map[string]string{}, map[string]error{}
					for name, c := range cases {
						got[name], guestErr[name] = create(inGuest, name, c)
					}
					require.Equal(t, before, n.Blobs(img.Layers...), "layers on the host before runc needs them")
					for name, c := range cases {
						want, runcErr := create(underRunc, name, c)
						if uid := name == "image's user" || name == "runAsUser"; uid && strings.HasPrefix(spec.Name, "none-uid-g") {
							require.Equal(t, `{"uid":101,"gid":0,"additionalGids":[0]}`, want, name)
							if spec.Name == "none-uid-gid" {
								require.JSONEq(t, `{"uid":101,"gid":7,"additionalGids":[7]}`, got[name], name)
							} else {
								require.ErrorContains(t, guestErr[name], "runAsUser: 101\n  runAsGroup: <GID of \"www\" in the image>", name)
							}
							continue
						}
						require.Equal(t, want, got[name], "%s: process.user; runc: %v; guest: %v", name, runcErr, guestErr[name])
						if runcErr == nil {
							same++
							continue
						}
						failed++
						require.ErrorContains(t, guestErr[name], "securityContext:\n  runAsUser: ", name)
					}
				})
			}
			t.Logf("%d users are those of runc, %d cannot be resolved in both", same, failed)
			require.NotZero(t, failed, "no image is one of which no container can be created")
		})
	}
}

// What the host cannot or must not take from an image ends in an error that says
// what to do, for names; it is never a guess.
func TestUnusableUsers(t *testing.T) {
	n, reg := newUsersNode(t, harness.Options{})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for _, spec := range []images.Spec{
		{Name: "encrypted", Layers: 2, Encoding: images.Encrypted},
		{Name: "directory", Top: [][]images.File{{{Name: "etc/passwd", Mode: fs.ModeDir | 0o755}}}},
		{Name: "loop", Top: [][]images.File{{{Name: "etc/passwd", Link: "passwd"}}}},
		{Name: "too-large", Passwd: strings.Repeat("#", 10<<20) + "\n" + somePasswd},
		{Name: "large-groups", Passwd: somePasswd, Group: strings.Repeat("#", 10<<20) + "\n"},
	} {
		t.Run(spec.Name, func(t *testing.T) {
			spec.User = "nginx"
			img := push(t, reg, spec)
			_, err := createdUser(t, n, pod, harness.ContainerSpec{Image: img.Ref})
			require.ErrorContains(t, err, "securityContext:\n  runAsUser: <UID of \"nginx\" in the image>")
			require.ErrorContains(t, err, img.Ref)
			// The remedy is one.
			user, err := createdUser(t, n, pod, harness.ContainerSpec{Image: img.Ref, RunAsUser: new(int64(101)), RunAsGroup: new(int64(102))})
			require.NoError(t, err)
			require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[102]}`, user)
		})
	}
	for _, f := range usersOnDisk(t, n) {
		require.Equal(t, "users/static/etc", filepath.Dir(f), "users that are not of the list")
	}
}

// usersOnDisk lists the files with users in the snapshotter's directory.
func usersOnDisk(t *testing.T, n *harness.Node) (files []string) {
	t.Helper()
	root := n.SnapshotterRoot(harness.Snapshotter)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if rel != "metadata.db" && rel != "users.db" {
			files = append(files, rel)
		}
		return err
	})
	require.NoError(t, err)
	return files
}

// Layers are read from the top down until both files are certain, once for all
// images that share the chain, with the pull's own credentials, and nothing of
// them stays but the two files.
func TestUsersCostWhatIsNeeded(t *testing.T) {
	const user, password = "user", "pass:word/4711"
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			o := path.options
			// Sandboxes are not pulled with a pod's credentials.
			open := newRegistry(t)
			pause, err := images.Pause()
			require.NoError(t, err)
			o.PauseImage, err = open.Push("pause:1", pause)
			require.NoError(t, err)
			o.Registry = newRegistry(t, registry.WithTLS(), registry.WithTokenAuth(user, password))
			n, reg := newUsersNode(t, o)
			auth := &runtimeapi.AuthConfig{Username: user, Password: password}
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			reg.Reset()

			img := push(t, reg, images.Spec{Name: "app", Layers: 20, LayerSize: 256 << 10, User: "nginx",
				Top: [][]images.File{text("etc/passwd", somePasswd), text("etc/group", someGroup), text("srv/top", "x")}})
			create := func(ref string) {
				got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: ref, Auth: auth, PullPolicy: harness.Always})
				require.NoError(t, err)
				require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[4,102,103]}`, got)
			}
			create(img.Ref)
			read := reg.Log().By(registry.Host).Of(registry.Layer).OK()
			require.Equal(t, []string{img.Layers[22], img.Layers[21], img.Layers[20]}, read.References(), "layers that were read")
			total, err := images.LayersSize(img.Image)
			require.NoError(t, err)
			t.Logf("read %d bytes of an image of %d bytes (%.2f %%)", read.Bytes(), total, 100*float64(read.Bytes())/float64(total))
			require.Less(t, read.Bytes(), total/100)

			reg.Reset()
			create(img.Ref)
			require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer), "layers read again")
			// The same layers in an image of another configuration.
			other := push(t, reg, images.Spec{Name: "app", Layers: 20, LayerSize: 256 << 10, User: "101", Env: []string{"A=B"},
				Top: [][]images.File{text("etc/passwd", somePasswd), text("etc/group", someGroup), text("srv/top", "x")}})
			require.Equal(t, img.ChainID, other.ChainID)
			create(other.Ref)
			require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer), "layers read again for the same chain")

			require.Empty(t, n.Blobs(img.Layers...))
			dir := filepath.Join("users", strings.ReplaceAll(img.ChainID, ":", "-"), "etc")
			// The sandbox has the list's: the pause image is not read.
			require.ElementsMatch(t, []string{filepath.Join(dir, "passwd"), filepath.Join(dir, "group"),
				"users/static/etc/passwd", "users/static/etc/group"}, usersOnDisk(t, n))
			log, err := os.ReadFile(n.LogFile())
			require.NoError(t, err)
			require.NotContains(t, string(log), password)
		})
	}
}

// Layers are read as slowly as they come, also where a pull without progress ends
// soon; a registry that sends nothing more is given up.
func TestUsersWithAShortProgressTimeout(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			t.Parallel()
			o := path.options
			o.ExtraConfig = "[plugins.'io.containerd.cri.v1.images']\nimage_pull_progress_timeout = \"2s\"\n"
			n, reg := newUsersNode(t, o)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			// The users are in the lowest layer.
			spec := images.Spec{Name: "slow", Layers: 3, LayerSize: 8 << 10, User: "nginx", Passwd: somePasswd, Group: someGroup}
			img := push(t, reg, spec)
			layers, err := images.LayersSize(img.Image)
			require.NoError(t, err)
			well := reg.Inject(registry.Fault{Match: registry.Kinds(registry.Layer), Do: registry.Slow(int(layers)/8, 700*time.Millisecond)})
			start := time.Now()
			got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: img.Ref})
			well()
			require.NoError(t, err)
			require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[4,102,103]}`, got)
			require.Greater(t, time.Since(start), 4*time.Second, "it was not slow")

			spec.Name, spec.Env = "stuck", []string{"A=B"}
			spec.Passwd += "more:x:200:200::/:\n"
			img = push(t, reg, spec)
			well = reg.Inject(registry.Fault{Match: registry.Kinds(registry.Layer), Do: registry.Hang()})
			start = time.Now()
			_, err = createdUser(t, n, pod, harness.ContainerSpec{Image: img.Ref})
			well()
			// The transfer service does not know what is read: either its HTTP client
			// gives up, or the reader of users, both after as long.
			gaveUp, within := "the registry sent nothing for 30s|timeout awaiting response headers", 50*time.Second
			if path.options.LocalPull {
				gaveUp, within = "canceled", 20*time.Second
			}
			require.Error(t, err)
			require.Regexp(t, gaveUp, err.Error())
			require.Less(t, time.Since(start), within)
		})
	}
}

// disable_layer_fetch outranks resolve_users: no layer is read, and a container
// whose user has a number is none the worse for it.
func TestUsersWhereNoLayerIsFetched(t *testing.T) {
	for _, path := range pullPaths[:2] {
		t.Run(path.name, func(t *testing.T) {
			o := path.options
			o.ExtraConfig = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.guest]\ndisable_layer_fetch = true\n"
			n, reg := newUsersNode(t, o)
			pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
			spec := images.Spec{Name: "named", Layers: 3, User: "nginx", Passwd: somePasswd, Group: someGroup}
			_, err := createdUser(t, n, pod, harness.ContainerSpec{Image: push(t, reg, spec).Ref})
			require.ErrorContains(t, err, "securityContext")
			spec.Name, spec.User = "numbered", "101:102"
			got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: push(t, reg, spec).Ref})
			require.NoError(t, err)
			require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[102]}`, got)
			require.Empty(t, reg.Log().By(registry.Host).Of(registry.Layer))
		})
	}
}

// What is known of an image goes with it, and not before the last image or
// container that has its layers; and what goes missing of it comes back.
func TestUsersLiveAsLongAsTheirImage(t *testing.T) {
	ctx := t.Context()
	n, reg := newUsersNode(t, harness.Options{})
	spec := images.Spec{Name: "one", User: "nginx", Passwd: somePasswd, Group: someGroup}
	one := push(t, reg, spec)
	second, err := reg.Push("second:1", one.Image)
	require.NoError(t, err)
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	create := func(ref string) {
		t.Helper()
		got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: ref})
		require.NoError(t, err)
		require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[4,102,103]}`, got)
	}
	layersRead := func() int { return len(reg.Log().By(registry.Host).Of(registry.Layer).OK()) }
	create(one.Ref)
	create(second)
	reg.Reset()

	// The directory is derived, at whatever time it goes.
	users := filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "users")
	require.NoError(t, n.GC(ctx))
	require.NoDirExists(t, filepath.Join(users, strings.ReplaceAll(one.ChainID, ":", "-")), "directory that no container needs")
	create(one.Ref)
	require.NoError(t, n.Kill())
	require.NoError(t, os.RemoveAll(users))
	require.NoError(t, os.MkdirAll(filepath.Join(users, "new-left-by-a-crash", "etc"), 0o755))
	require.NoError(t, n.Up(ctx))
	create(one.Ref)
	require.NoError(t, n.GC(ctx))
	require.NoDirExists(t, filepath.Join(users, "new-left-by-a-crash"))

	// The last of them decides.
	c := run(t, pod, harness.ContainerSpec{Image: second})
	require.NoError(t, n.RemoveImage(ctx, one.Ref))
	require.NoError(t, n.GC(ctx))
	_, err = pod.Pull(ctx, one.Ref)
	require.NoError(t, err)
	require.Zero(t, layersRead(), "read again although a container has the layers")
	require.NoError(t, c.Remove(ctx))
	require.NoError(t, n.RemoveImage(ctx, one.Ref))
	require.NoError(t, n.RemoveImage(ctx, second))
	require.NoError(t, n.GC(ctx))
	create(one.Ref)
	require.Equal(t, 1, layersRead(), "known although the image was gone")
}

// An image whose users are not known, as the option was set after it was pulled or
// as the store was lost, is pulled again by kubelet's own retry. It does not run
// with other IDs than before. One that has no users which can be read is not
// pulled for ever.
func TestUsersComeBack(t *testing.T) {
	ctx := t.Context()
	n, reg := newUsersNode(t, harness.Options{})
	img := push(t, reg, images.Spec{Name: "app", User: "101", Passwd: somePasswd, Group: someGroup})
	encrypted := push(t, reg, images.Spec{Name: "encrypted", User: "101", Encoding: images.Encrypted})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	const want = `{"uid":101,"gid":102,"additionalGids":[4,102,103]}`
	create := func(pod *harness.Pod, ref, want string) {
		t.Helper()
		got, err := createdUser(t, n, pod, harness.ContainerSpec{Image: ref})
		require.NoError(t, err)
		require.JSONEq(t, want, got)
	}
	create(pod, img.Ref, want)
	create(pod, encrypted.Ref, `{"uid":101,"gid":0,"additionalGids":[0]}`)
	reg.Reset()
	create(pod, img.Ref, want)
	create(pod, encrypted.Ref, `{"uid":101,"gid":0,"additionalGids":[0]}`)
	require.Empty(t, reg.Log().By(registry.Host), "pulled again although all is known")

	require.NoError(t, n.Kill())
	require.NoError(t, os.Remove(filepath.Join(n.SnapshotterRoot(harness.Snapshotter), "users.db")))
	require.NoError(t, n.Up(ctx))
	_, err := pod.CreateFrom(ctx, &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: "impatient"},
		Image:    &runtimeapi.ImageSpec{Image: img.Ref},
		Linux:    &runtimeapi.LinuxContainerConfig{SecurityContext: &runtimeapi.LinuxContainerSecurityContext{}},
	})
	require.ErrorContains(t, err, "has to be pulled again", "a client that did not look")
	// Somebody else's image with the same config, whose layers nobody can read, says
	// nothing of this one.
	forged := rewritten(t, reg, img, "forged", func(_ int, layer map[string]any) {
		layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
	})
	create(pod, forged.Ref, `{"uid":101,"gid":0,"additionalGids":[0]}`)
	reg.Reset()
	create(pod, forged.Ref, `{"uid":101,"gid":0,"additionalGids":[0]}`)
	require.Empty(t, reg.Log().By(registry.Host), "it would be pulled for ever")
	create(pod, img.Ref, want)
	require.Equal(t, img.Layers, reg.Log().By(registry.Host).In("app").Of(registry.Layer).OK().References())
	// The pause image has no exception.
	create(runPod(t, n, harness.PodSpec{Handler: harness.Guest}), img.Ref, want)
}

// An image that was pulled, but not for this handler, has no users on the host. A client
// that creates a container of it all the same is told that this is the cause, and each
// way out that the error names is one.
func TestUsersOfAnImagePulledForNobody(t *testing.T) {
	ctx := t.Context()
	n, reg := newUsersNode(t, harness.Options{})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for name, wayOut := range map[string]struct {
		said string
		do   func(img image) error
	}{
		"kubelet": {"kubelet does so when it next tries to start the container, unless the pod's imagePullPolicy is Never", func(img image) error {
			_, err := pod.EnsureImage(ctx, img.Ref, harness.IfNotPresent, nil)
			return err
		}},
		"crictl": {"crictl does with pull --pod-config", func(img image) error {
			_, err := pod.Pull(ctx, img.Ref)
			return err
		}},
		"ctr": {"ctr with -n k8s.io images pull --snapshotter guest-pull", func(img image) error {
			_, err := n.Ctr(ctx, "-n", "k8s.io", "images", "pull", "--plain-http", "--snapshotter", "guest-pull", img.Ref)
			return err
		}},
	} {
		t.Run(name, func(t *testing.T) {
			// Each with users of its own: they are kept for all images with the same layers.
			img := push(t, reg, images.Spec{Name: name, User: "nginx", Passwd: somePasswd + name + ":x:300:300::/:\n", Group: someGroup})
			// As "crictl pull" does.
			id, err := n.Pull(ctx, harness.PullSpec{Image: img.Ref})
			require.NoError(t, err)
			create := func() (string, error) {
				c, err := pod.CreateFrom(ctx, &runtimeapi.ContainerConfig{
					Metadata: &runtimeapi.ContainerMetadata{Name: name},
					Image:    &runtimeapi.ImageSpec{Image: id},
					Linux:    &runtimeapi.LinuxContainerConfig{},
				})
				if err != nil {
					return "", err
				}
				return processUser(ctx, n, c.ID)
			}
			_, err = create()
			for _, s := range []string{img.Ref, `snapshotter "guest-pull"`, "by a client that did not say for which pod", "has to be pulled again", wayOut.said} {
				require.ErrorContains(t, err, s)
			}
			require.NoError(t, wayOut.do(img))
			got, err := create()
			require.NoError(t, err)
			require.JSONEq(t, `{"uid":101,"gid":102,"additionalGids":[4,102,103]}`, got)
		})
	}
}

// An administrator's list serves every image whose own users are not known, be it
// encrypted, and needs neither the network nor a patch.
func TestListedUsers(t *testing.T) {
	n, reg := newNode(t, harness.Options{PluginConfig: `
[plugins.'io.containerd.snapshotter.v1.guest-pull'.users]
  nginx = "101:102"
  app = "1000"
[plugins.'io.containerd.snapshotter.v1.guest-pull'.groups]
  adm = { gid = 4, members = ["nginx", "root"] }
  www = { gid = 103 }
`})
	pod := runPod(t, n, harness.PodSpec{Handler: harness.Guest})
	for user, want := range map[string]string{
		"nginx":     `{"uid":101,"gid":102,"additionalGids":[4,102]}`,
		"nginx:www": `{"uid":101,"gid":103,"additionalGids":[4,103]}`,
		"app":       `{"uid":1000,"gid":0,"additionalGids":[0]}`,
		"root":      `{"uid":0,"gid":0,"additionalGids":[0,4]}`,
		"":          `{"uid":0,"gid":0,"additionalGids":[0,4]}`,
		"101":       `{"uid":101,"gid":102,"additionalGids":[4,102]}`,
		"101:7":     `{"uid":101,"gid":7,"additionalGids":[4,7]}`,
	} {
		img := push(t, reg, images.Spec{Name: "u" + strings.ReplaceAll(user, ":", "-"), User: user, Encoding: images.Encrypted})
		got, err := createdUserOfImage(t, n, pod, img.Ref)
		require.NoError(t, err, user)
		require.JSONEq(t, want, got, user)
	}
	img := push(t, reg, images.Spec{Name: "unlisted", User: "apache"})
	_, err := createdUser(t, n, pod, harness.ContainerSpec{Image: img.Ref})
	require.ErrorContains(t, err, "no users found")
	require.NoError(t, pod.Remove(t.Context()))
	require.NoError(t, n.GC(t.Context()))
	require.Empty(t, usersOnDisk(t, n), "the directory is needed by no container")
}

// Every mistake in the options is told at once, by their names, at start.
func TestUsersAreValidated(t *testing.T) {
	_, err := harness.Start(t.Context(), harness.Options{PluginConfig: `
resolve_users = "guest"
[plugins.'io.containerd.snapshotter.v1.guest-pull'.users]
  nginx = "nginx"
[plugins.'io.containerd.snapshotter.v1.guest-pull'.groups]
  adm = { members = ["stranger"] }
`, ExtraConfig: "required_plugins = ['io.containerd.snapshotter.v1.guest-pull']"})
	require.ErrorContains(t, err, `resolve_users = \"guest\"`)
	require.ErrorContains(t, err, `users has \"nginx\" = \"nginx\"`)
	require.ErrorContains(t, err, "groups.adm has no gid")
}
