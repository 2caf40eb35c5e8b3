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

package snapshotter

import (
	"context"
	"flag"
	"net"
	"os"
	"path/filepath"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	"github.com/containerd/containerd/v2/pkg/testutil"
	"github.com/stretchr/testify/require"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/guest-pull/guest-pull-snapshotter/plugin/users"
)

// requireRoot skips a test that mounts, unless it runs with -test.root.
func requireRoot(t testing.TB) {
	if f := flag.Lookup("test.root"); f == nil || f.Value.String() != "true" {
		t.Skip("mounts: run as root with -test.root")
	}
	testutil.RequiresRoot(t)
}

var configs = map[string]Config{
	"default": {},
	"sync":    {SyncRemove: true},
	"options": {MountOptions: []string{"volatile"}, MountType: "fuse.guest-pull-overlayfs"},
	"users":   {Users: users.Config{Resolve: users.ResolveRegistry, Users: map[string]string{"nginx": "101:101"}}},
}

// containerd's own conformance suite. The name decides what the rename cases
// expect; it is overlayfs's because the container side is.
func TestConformance(t *testing.T) {
	requireRoot(t)
	for name, config := range configs {
		t.Run(name, func(t *testing.T) {
			testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
				s, err := New(ctx, root, config)
				if err != nil {
					return nil, nil, err
				}
				return s, s.Close, nil
			})
		})
	}
}

// The same through containerd's proxy: whatever the interface returns has to
// survive the trip, errors' kinds included.
func TestConformanceProxy(t *testing.T) {
	requireRoot(t)
	testsuite.SnapshotterSuite(t, "overlayfs", func(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, err := New(ctx, root, Config{})
		if err != nil {
			return nil, nil, err
		}
		client, stop, err := serve(s, filepath.Join(root, "s.sock"))
		return client, stop, err
	})
}

func serve(s snapshots.Snapshotter, socket string) (snapshots.Snapshotter, func() error, error) {
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, nil, err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(s))
	go server.Serve(l) //nolint:errcheck // ends with Stop
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, err
	}
	return proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(conn), "guest-pull"), func() error {
		conn.Close()
		server.Stop()
		return s.Close()
	}, nil
}

// newSnapshotter returns a snapshotter on root and checks, at the end of the
// test, that its directories are those of its snapshots and nothing else.
func newSnapshotter(t *testing.T, root string, config Config) Snapshotter {
	t.Helper()
	ctx := t.Context()
	s, err := New(ctx, root, config)
	require.NoError(t, err)
	t.Cleanup(func() {
		ctx := context.WithoutCancel(ctx)
		rows := 0
		if err := s.Walk(ctx, func(context.Context, snapshots.Info) error { rows++; return nil }); err == nil {
			require.NoError(t, s.(snapshots.Cleaner).Cleanup(ctx))
			require.Len(t, directories(t, root), rows)
		}
		require.NoError(t, s.Close())
	})
	return s
}

func directories(t *testing.T, root string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	require.NoError(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
