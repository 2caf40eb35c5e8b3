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
	"os"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/containerd/v2/pkg/shim"
)

// Start starts the server process, which has to enter its guest first.
func (m guestManager) Start(ctx context.Context, params *bootapi.BootstrapParams) (*bootapi.BootstrapResult, error) {
	if err := ensureSpec(); err != nil {
		return nil, err
	}
	if err := os.Setenv(stageEnv, stageEnter); err != nil {
		return nil, err
	}
	return m.Shim.Start(ctx, params)
}

// socketAddress is the address of a shim's socket. The working directory is the
// bundle; the link to the directory of the sockets is in the one that the shim was
// started for.
func socketAddress(ctx context.Context, id string, debug bool) (string, error) {
	dir, err := os.Readlink("s")
	if err != nil {
		return "", err
	}
	return shim.CreateSocketAddress(ctx, dir, os.Getenv("GRPC_ADDRESS"), id, debug)
}
