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
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"github.com/containerd/typeurl/v2"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/guest-pull/guest-pull-snapshotter/integration/shim-guest/guest"
)

// CRI gives a runtime that is not runc the generic options; the embedded runc
// shim takes anything but its own kind for a bug and panics.
func TestConfigOfARequest(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, []byte(content), 0o600))
		return path
	}
	t.Setenv(guest.ConfigEnv, file("env.json", `{"record_dir":"/env","runc_root":"/runc"}`))
	request := func(options any) *taskAPI.CreateTaskRequest {
		r := &taskAPI.CreateTaskRequest{}
		if options != nil {
			var err error
			r.Options, err = typeurl.MarshalAnyToProto(options)
			require.NoError(t, err)
		}
		return r
	}

	cfg, o, err := config(request(nil))
	require.NoError(t, err)
	assert.Equal(t, "/env", cfg.RecordDir)
	assert.Equal(t, guest.FlavourGo, cfg.Flavour)
	assert.Equal(t, "/runc", o.Root)

	cfg, o, err = config(request(&options.Options{Root: "/other", NoNewKeyring: true}))
	require.NoError(t, err)
	assert.Equal(t, "/env", cfg.RecordDir)
	assert.Equal(t, "/other", o.Root)
	assert.True(t, o.NoNewKeyring)

	cfg, o, err = config(request(&runtimeoptions.Options{ConfigPath: file("option.json", `{"flavour":"rust"}`)}))
	require.NoError(t, err)
	assert.Equal(t, guest.FlavourRust, cfg.Flavour)
	assert.Empty(t, cfg.RecordDir, "one file wins over the other, and is not merged with it")
	assert.Empty(t, o.Root)
	assert.False(t, o.SystemdCgroup)

	_, o, err = config(request(&runtimeoptions.Options{ConfigPath: file("systemd.json", `{"systemd_cgroup":true}`)}))
	require.NoError(t, err)
	assert.True(t, o.SystemdCgroup)

	_, _, err = config(request(&runtimeoptions.Options{}))
	require.NoError(t, err)
	_, _, err = config(request(&runtimeoptions.Options{ConfigBody: []byte("flavour = 'rust'")}))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
	assert.ErrorContains(t, err, "ConfigPath")
	_, _, err = config(request(&runtimeoptions.Options{ConfigPath: filepath.Join(dir, "missing")}))
	require.ErrorIs(t, err, errdefs.ErrInvalidArgument)
}

// Without the start action there is no guest, and images would be unpacked on
// the host.
func TestServesInsideTheGuestOnly(t *testing.T) {
	t.Setenv(stageEnv, "")
	_, err := insideGuest()
	require.ErrorContains(t, err, stageEnv)

	t.Chdir(t.TempDir())
	require.NoError(t, os.Mkdir(guestDir, 0o700))
	if isTmpfs(t, guestDir) {
		t.Skip("the temporary directory is a tmpfs itself")
	}
	t.Setenv(stageEnv, stageInside)
	_, err = insideGuest()
	require.ErrorContains(t, err, "not a tmpfs")
}

func TestPauseProgramIsStatic(t *testing.T) {
	require.ErrorContains(t, checkStatic("/bin/sh"), "CGO_ENABLED=0")
	require.ErrorContains(t, checkStatic("/etc/passwd"), "pause program")
}

// A shim that was killed may still be listening for a moment when containerd cleans up
// after it; one that serves others is not dead.
func TestSocketsOfADeadShim(t *testing.T) {
	ctx := namespaces.WithNamespace(t.Context(), "test")
	sockets := t.TempDir()
	t.Chdir(t.TempDir())
	require.NoError(t, os.Symlink(sockets, "s"))
	var listeners []net.Listener
	for _, debug := range []bool{false, true} {
		address, err := socketAddress(ctx, "id", debug)
		require.NoError(t, err)
		l, err := shim.NewSocket(address)
		require.NoError(t, err)
		l.SetUnlinkOnClose(false)
		defer l.Close()
		listeners = append(listeners, l)
	}
	left := func() (names []string) {
		entries, err := os.ReadDir(sockets)
		require.NoError(t, err)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}

	server, err := ttrpc.NewServer()
	require.NoError(t, err)
	lives := listeners[0].(*net.UnixListener)
	f, err := lives.File()
	require.NoError(t, err)
	again, err := net.FileListener(f)
	require.NoError(t, err)
	again.(*net.UnixListener).SetUnlinkOnClose(false)
	go server.Serve(ctx, again) //nolint:errcheck // it ends with its listener
	removeSockets(ctx, "id")
	require.Len(t, left(), 2, "of a shim that answers")
	require.NoError(t, server.Close())

	// The kernel still takes connections.
	time.AfterFunc(200*time.Millisecond, func() { f.Close(); lives.Close() })
	removeSockets(ctx, "id")
	require.Empty(t, left(), "of a shim that does not")
}
