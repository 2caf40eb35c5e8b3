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

// Package guard keeps containerd alive when one of the plugin's databases is
// damaged: bbolt panics on a damaged page and faults on a truncated file.
package guard

import (
	"errors"
	"fmt"
	"runtime/debug"
)

// ErrDamaged is what a panic or a fault becomes.
var ErrDamaged = errors.New("the database is damaged")

// Do calls fn, which uses a database. A panic, or a fault in the memory that the
// database's file is mapped to, becomes an error that wraps ErrDamaged. The
// database cannot be closed then: it may hold its own locks.
func Do(fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, r)
		}
	}()
	return fn()
}
