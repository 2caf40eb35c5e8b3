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
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
)

// Values of Config.Resolve.
const (
	// ResolveOff leaves image layers alone. It is the default.
	ResolveOff = "off"
	// ResolveRegistry reads the users and groups of an image out of its layers
	// in the registry when the image is pulled.
	ResolveRegistry = "registry"
)

// Config is what can be configured of the users of images. The zero value is the
// default: nothing is known.
type Config struct {
	// Users and Groups are an administrator's list of users, "uid" or "uid:gid"
	// by name, and of groups. Containers have them whose image's own are not
	// known.
	Users  map[string]string
	Groups map[string]Group

	// Resolve is where the users and groups of an image are read when it is
	// pulled: ResolveOff, which "" means too, or ResolveRegistry.
	Resolve string

	// Observe, unless nil, is called for each pulled image when Resolve is on:
	// "read", "known" already, "unusable", or "failed".
	Observe func(result string)
}

// Validate reports all that is wrong with a configuration. Each error names the
// key, the value and what is accepted, and wraps errdefs.ErrInvalidArgument.
func (c Config) Validate() error {
	var err error
	switch c.Resolve {
	case "", ResolveOff, ResolveRegistry:
	default:
		err = fmt.Errorf("resolve_users = %q: want %q or %q: %w", c.Resolve, ResolveOff, ResolveRegistry, errdefs.ErrInvalidArgument)
	}
	_, listErr := Static(c.Users, c.Groups)
	return errors.Join(err, listErr)
}

// Images gives containers the users and groups of their images: as the lowest
// directory of their mount, which has etc/passwd and etc/group and is otherwise
// empty. containerd and its clients look there. Images are known by the chain IDs of
// their top layers.
//
// The directories are made of what is known when they are needed (directory.go).
// What is known is read in a pull (pull.go) and kept (store.go), or is the
// administrator's list (static.go).
type Images struct {
	root   string // of the directories, each named like the chain ID of its image
	static Files
	known  *store // nil if nothing is read from registries
	// observe counts how pulled images fare; see Config.Observe.
	observe func(result string)

	mu sync.RWMutex // guards the directories

	readMu  sync.Mutex
	reading map[string]chan struct{} // closed when the image has been read
}

// staticUsers is the name of the directory for images of which nothing is known.
const staticUsers = "static"

// New returns what is known of images' users. It keeps that below root, in
// users.db and users/. Errors of the configuration are those of Validate; it fails
// as well when root cannot be written, or when another process has users.db open.
// One that is damaged is replaced.
func New(ctx context.Context, root string, config Config) (*Images, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	u := &Images{root: filepath.Join(root, "users"), reading: map[string]chan struct{}{}, observe: config.Observe}
	if u.observe == nil {
		u.observe = func(string) {}
	}
	var err error
	if u.static, err = Static(config.Users, config.Groups); err != nil {
		return nil, err
	}
	path := filepath.Join(root, "users.db")
	if config.Resolve != ResolveRegistry {
		// What was read when the option was set is not used without it.
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("remove what was kept of images' users: %w", err)
		}
		return u, nil
	}
	u.known, err = openStore(ctx, path)
	return u, err
}

// Close closes the store.
func (u *Images) Close() error {
	if u.known == nil {
		return nil
	}
	return u.known.close()
}

// Known lists the images whose users were read, in vain or not.
func (u *Images) Known() ([]string, error) {
	if u.known == nil {
		return nil, nil
	}
	return u.known.chains()
}

// Forget forgets an image. One that is not known is no error, and costs no write.
func (u *Images) Forget(chain string) error {
	if u.known == nil {
		return nil
	}
	return u.known.remove(chain)
}

// files returns what is known for containers of an image, and the name of the
// directory for it. Of an image of which nothing is known there are root and the list.
func (u *Images) files(chain string) (Files, string, error) {
	if u.known != nil {
		files, ok, err := u.known.get(chain)
		if err != nil {
			return Files{}, "", err
		}
		if ok {
			return files, directoryName(chain), nil
		}
	}
	return u.static, staticUsers, nil
}
