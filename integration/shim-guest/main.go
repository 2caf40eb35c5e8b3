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
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	taskAPI "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types"
	"github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2/manager"
	"github.com/containerd/containerd/v2/pkg/shim"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
)

const runtimeName = "io.containerd.guest.v2"

// The server process finds in stageEnv how far it has come. Nobody but the
// "start" action sets it, so the actions of the shim are left alone.
const (
	stageEnv    = "GUEST_PULL_STAND_IN_GUEST_STAGE"
	stageEnter  = "enter"  // started by the "start" action, in the host's mount namespace
	stageInside = "inside" // executed again, in the guest's mount namespace
)

func main() {
	switch filepath.Base(os.Args[0]) {
	case pauseName:
		pause()
		return
	case machineName:
		machine()
		return
	}
	if os.Getenv(stageEnv) == stageEnter {
		// Does not return when all went well.
		err := enterGuest()
		logToContainerd(err)
		fmt.Fprintf(os.Stderr, "%s: %v\n", runtimeName, err)
		os.Exit(1)
	}
	shim.RunShim(context.Background(), guestManager{Shim: manager.NewShimManager(runtimeName)})
}

// guestManager is the manager of the runc shim: the grouping and the sockets are
// the same.
type guestManager struct {
	shim.Shim
}

// ensureSpec makes the OCI configuration of a sandbox that the shim makes by
// itself, which has none, an empty one: the runc shim wants to read it.
func ensureSpec() error {
	f, err := os.OpenFile("config.json", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = f.WriteString("{}")
	return errors.Join(err, f.Close())
}

// Stop cleans up after a shim that is dead. For the guest itself there is nothing
// to do: it lives in the mount namespace of the shim and of its containers.
func (m guestManager) Stop(ctx context.Context, id string) (shim.StopStatus, error) {
	status, err := m.Shim.Stop(ctx, id)
	removeSockets(ctx, id)
	return status, err
}

// removeSockets removes the sockets of a dead shim, which the runc shim leaves. The
// shim of a sandbox whose own task is gone may serve other containers.
func removeSockets(ctx context.Context, id string) {
	address, err := socketAddress(ctx, id, false)
	if err != nil || answers(ctx, address, id) {
		return
	}
	for _, debug := range []bool{false, true} {
		if address, err = socketAddress(ctx, id, debug); err == nil {
			err = shim.RemoveSocket(address)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			log.G(ctx).WithError(err).WithField("id", id).Warn("the socket of a dead shim stays")
		}
	}
}

// answers reports whether a shim answers at an address. That one can connect says
// nothing: the kernel closes the files of a process that was killed one by one, and
// containerd, which saw the end of a connection, has the shim cleaned up before it is
// done.
func answers(ctx context.Context, address, id string) bool {
	conn, err := shim.AnonDialer(address, 100*time.Millisecond)
	if err != nil {
		return false
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	_, err = taskAPI.NewTTRPCTaskClient(client).Connect(ctx, &taskAPI.ConnectRequest{ID: id})
	_, said := status.FromError(err)
	return said
}

// Info describes the runtime. The runtime options are not looked at: they may be
// of the generic type, which the runc shim refuses.
func (m guestManager) Info(ctx context.Context, _ io.Reader) (*types.RuntimeInfo, error) {
	return m.Shim.Info(ctx, strings.NewReader(""))
}
