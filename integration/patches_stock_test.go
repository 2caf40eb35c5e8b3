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
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/guest-pull/guest-pull-snapshotter/integration/harness"
	"github.com/guest-pull/guest-pull-snapshotter/integration/registry"
)

// unpatchedEnv names the directory of a containerd that has the plugin but no
// patches, instead of the one that `make bench-binaries` builds.
const unpatchedEnv = "GUEST_PULL_UNPATCHED"

// eachContainerd runs a test against the containerd under test, and then against
// the same containerd without patches. A patch is there because the second one
// gets something wrong: the test says what, and fails when that is no longer so,
// for then the patch can go.
func eachContainerd(t *testing.T, test func(t *testing.T, binaries string)) {
	t.Helper()
	t.Run("patched", func(t *testing.T) {
		t.Parallel() // Most of the time is waiting.
		dir, err := harness.Binaries()
		require.NoError(t, err)
		test(t, dir)
	})
	t.Run("stock", func(t *testing.T) {
		t.Parallel()
		dir, err := unpatchedBinaries()
		require.NoError(t, err)
		if _, err := os.Stat(filepath.Join(dir, "containerd")); err != nil {
			t.Skipf("there is no containerd without patches to compare with: %v; run `make bench-binaries`, or set %s", err, unpatchedEnv)
		}
		test(t, dir)
	})
}

// unpatchedBinaries returns the directory of the containerd without patches.
func unpatchedBinaries() (string, error) {
	if dir := os.Getenv(unpatchedEnv); dir != "" {
		return dir, nil
	}
	return harness.Peer("unpatched")
}

// hasPatch reports whether the node's containerd has the patch of this number.
func hasPatch(n *harness.Node, number string) bool {
	return slices.ContainsFunc(n.Patches(), func(p string) bool { return strings.HasPrefix(p, number+"-") })
}

// requireFixed holds that err is nil on a node which has the patch, and contains
// what stock containerd is known to get wrong on one which has not; "" says that
// it gets this right.
func requireFixed(t *testing.T, n *harness.Node, number string, err error, stock string) {
	t.Helper()
	if hasPatch(n, number) || stock == "" {
		require.NoError(t, err)
		return
	}
	require.ErrorContainsf(t, err, stock, "without patch %s; if this is right now, the patch is no longer needed", number)
}

// newMixedNode starts a node for pods of both kinds. On the node there is the
// pause image for both, so that it is out of the way: without patches, it works
// for both only if the handler runc comes first.
func newMixedNode(t *testing.T, o harness.Options) (*harness.Node, *registry.Registry) {
	t.Helper()
	if o.Registry == nil {
		o.Registry = newRegistry(t)
	}
	n := harness.New(t, o)
	for _, handler := range []string{harness.Runc, harness.Guest} {
		require.NoError(t, runPod(t, n, harness.PodSpec{Handler: handler}).Remove(t.Context()))
	}
	return n, o.Registry
}

// start makes kubelet's attempts to get a container running, and returns their
// errors, the last of which is nil if it runs.
func start(ctx context.Context, p *harness.Pod, s harness.ContainerSpec, attempts int) (*harness.Container, []error) {
	var errs []error
	for range attempts {
		c, err := p.Run(ctx, s)
		errs = append(errs, err)
		if err == nil {
			return c, errs
		}
	}
	return nil, errs
}

// checkUser fails if a container does not run as this user. kubelet takes root
// for an image that it is told is absent when it asks for the user.
func checkUser(ctx context.Context, c *harness.Container, uid string) error {
	out, err := c.Exec(ctx, "id", "-u")
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(out); got != uid {
		return fmt.Errorf("a container of a pod of handler %q runs as user %s and not as %s", c.Pod.Handler, got, uid)
	}
	return nil
}

// containersOf lists the containers of a pod.
func containersOf(t *testing.T, n *harness.Node, p *harness.Pod) []*runtimeapi.Container {
	t.Helper()
	r, err := n.Runtime.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{
		Filter: &runtimeapi.ContainerFilter{PodSandboxId: p.ID},
	})
	require.NoError(t, err)
	return r.GetContainers()
}
